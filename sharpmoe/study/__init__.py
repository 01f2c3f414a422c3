"""Studies: arms x seeds trained alike, measured alike, and compared in pairs."""
