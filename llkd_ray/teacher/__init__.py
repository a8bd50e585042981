"""What turns texts into label distributions: `base` and `factory`, and a module or folder for each kind."""
