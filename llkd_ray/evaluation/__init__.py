"""Evaluates a finished round or run: records and figures, computed from the run's files."""
