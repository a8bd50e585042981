"""A distillation run: `loop` contains the whole algorithm."""
