"""Implicit differentiation of the optimality conditions: one method, and one file for each class of problems."""
