"""Checks the set-up before a run."""
