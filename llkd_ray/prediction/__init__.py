"""Predicts a corpus with a trained student."""
