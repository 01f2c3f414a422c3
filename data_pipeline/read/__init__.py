"""Shards to batches: order, resume, damage."""
