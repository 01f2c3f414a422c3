"""Images to latents, captions to text states."""
