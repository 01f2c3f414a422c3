"""The diffusion transformer, its embedders, sizes and weight files."""
