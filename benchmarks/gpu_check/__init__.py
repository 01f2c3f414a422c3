"""What an owner of a GPU runs once: `sharpmoe gpu-check`. Figures of one device, and whether everything works on it."""
