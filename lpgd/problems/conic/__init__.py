"""Conic programs: structure, data, units, solutions."""
