"""The engine that runs an optimizer step, and the trainer around it."""
