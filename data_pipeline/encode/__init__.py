"""Pictures to latents, captions to text states."""
