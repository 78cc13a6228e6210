"""Declarative nodes with their own solvers, one file a node; :mod:`lpgd.nodes` is the list."""
