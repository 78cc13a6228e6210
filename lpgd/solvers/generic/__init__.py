"""Generic minimisers of smooth functions, for nodes without a solver of their own and for perturbed problems."""
