"""DeepSpeed's ZeRO behind one engine."""
