"""CVXPY problems as layers."""
