"""Which items fit: weights and capacities, the constraints of an integer program, learned from observed solutions."""
