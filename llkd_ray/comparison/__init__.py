"""Policies, or any other change of settings, against each other on the same labels."""
