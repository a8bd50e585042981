"""The run directory: files, tables, lock, checkpoints."""
