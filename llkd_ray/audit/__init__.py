"""People look at labels, and their answers come back into a run."""
