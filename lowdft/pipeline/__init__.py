"""Runs a recipe: the run folder, what each artifact depends on, and the stages."""
