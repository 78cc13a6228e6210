"""The declarative nodes: one file a node, with its solvers and its closed-form gradient."""
