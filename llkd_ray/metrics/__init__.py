"""Pure numpy: uncertainty, calibration, quality."""
