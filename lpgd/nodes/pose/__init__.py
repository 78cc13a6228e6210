"""Poses of cameras from points: the perspective-n-point problem."""
