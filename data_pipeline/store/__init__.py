"""Bytes of shards, from disks and servers."""
