"""One optimizer step, rollout schedules, the loop of a run, logs and monitoring."""
