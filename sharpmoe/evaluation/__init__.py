"""Measurements of a trained model: allocation of experts, held-out loss, samples for published figures."""
