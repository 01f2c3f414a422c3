"""Processes: joining the world of ranks, errors and signals that all ranks act on alike, lost ranks, side threads."""
