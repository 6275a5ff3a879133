"""Measures the base and the tuned model."""
