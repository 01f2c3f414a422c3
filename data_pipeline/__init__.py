"""From image files and captions to shards, and from shards to batches."""
