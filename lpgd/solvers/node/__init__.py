"""Solvers of declarative nodes: descent, the method of multipliers, and the bordered system."""
