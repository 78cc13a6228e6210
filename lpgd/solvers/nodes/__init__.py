"""Declarative nodes with their own solvers, one file a node."""
