"""Least squares on the sphere."""
