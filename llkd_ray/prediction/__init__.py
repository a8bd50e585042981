"""The student over a corpus."""
