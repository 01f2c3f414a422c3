"""One mixture-of-experts layer: router, selection rules, dispatch, experts, thresholds."""
