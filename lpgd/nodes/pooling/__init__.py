"""Robust pooling."""
