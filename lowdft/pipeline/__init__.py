"""A recipe at work: its run folder, what each artifact is made from, and the stages."""
