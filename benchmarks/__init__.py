"""Comparisons with other libraries, outside the package and its tests."""
