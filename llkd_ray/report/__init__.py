"""Draws what `evaluation` read: figures, pages, templates."""
