"""A distillation: `loop` is the algorithm on one page."""
