"""Memory and traffic of a layout before anything is started: what `launcher/plan.py` prints."""
