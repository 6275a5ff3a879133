"""Recipes and training arguments."""
