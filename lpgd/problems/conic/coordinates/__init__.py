"""Coordinates of cones in which the data and the solutions of a program are of one size."""
