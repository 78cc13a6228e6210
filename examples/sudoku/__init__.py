"""Learning the rules of Sudoku: a linear program whose constraints are trained (see README.md)."""
