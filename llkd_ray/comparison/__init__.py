"""Compares policies, or any other change of settings, on the same labels."""
