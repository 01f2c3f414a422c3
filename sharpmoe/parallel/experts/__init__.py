"""Experts spread over ranks: process groups and dispatchers."""
