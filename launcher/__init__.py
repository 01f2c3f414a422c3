"""Command lines: parse, wire, call. No logic lives here."""
