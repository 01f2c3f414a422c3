"""The bytes of shards, read from disks and servers."""
