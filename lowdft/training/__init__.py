"""One optimizer step, and the trainer around it."""
