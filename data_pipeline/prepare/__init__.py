"""Sources to shards, on any number of ranks."""
