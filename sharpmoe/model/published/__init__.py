"""Checkpoints of other publications: names, sizes, files."""
