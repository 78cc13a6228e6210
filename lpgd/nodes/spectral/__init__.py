"""Functions of symmetric matrices."""
