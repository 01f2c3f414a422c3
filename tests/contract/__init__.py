"""Tests that pin what users and other files rely on: imports, shipped configs, pinned versions, commands."""
