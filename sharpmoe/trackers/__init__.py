"""Where the figures of a run go beside log.jsonl: one writer interface, and a table of its implementations."""
