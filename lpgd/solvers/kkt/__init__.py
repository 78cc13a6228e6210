"""The linear systems of optimality conditions, their solution, and Newton's method by them."""
