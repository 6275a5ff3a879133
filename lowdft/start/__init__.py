"""Where people start: what this machine can do, and a first recipe from a model and a file of rows."""
