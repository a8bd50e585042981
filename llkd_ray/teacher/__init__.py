"""Teachers return label distributions for texts: `base`, `factory`, and one module or folder per kind."""
