"""Reads a finished round or run into records and figures."""
