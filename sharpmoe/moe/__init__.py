"""One mixture-of-experts layer: routing rules, router, capacity, dispatch, experts."""
