"""Renders the records from ``evaluation``: figures, pages, templates."""
