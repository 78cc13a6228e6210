"""Solver packages, one file each, and the forms in which they see a problem."""
