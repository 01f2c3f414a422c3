"""Speed of what matters, beside a reference in the same process. Figures are printed, never asserted by tests."""
