"""Human audit: exports labels for review and imports the answers into a run."""
