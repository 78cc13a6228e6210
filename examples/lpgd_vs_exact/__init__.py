"""LPGD against exact gradients, on a differentiable quadratic program and on a linear one."""
