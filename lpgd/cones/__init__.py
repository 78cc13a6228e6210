"""The product of cones: sizes and row order, projections, and the pieces on which these are smooth."""
