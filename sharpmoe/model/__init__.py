"""The backbone contract, the diffusion transformer, and weights files."""
