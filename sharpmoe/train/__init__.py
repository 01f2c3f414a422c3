"""One optimizer step, the loop around it, EMA, checkpoints, metrics."""
