"""Layers: the user's parameters become problem data, and solutions become the user's variables."""

from lpgd.layers.cvxpy import CvxpyLayer, LayerOutput

__all__ = ["CvxpyLayer", "LayerOutput"]
