"""Memory and traffic of a run before it is started: what `launcher/plan.py` prints."""
