"""Measuring base and tuned model."""
