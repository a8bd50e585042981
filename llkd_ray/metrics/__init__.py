"""Uncertainty, calibration and quality metrics on arrays. Uses no Ray and no torch."""
