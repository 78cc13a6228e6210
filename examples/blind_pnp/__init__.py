"""Pose of a camera from points whose correspondences are unknown, learned through transport and pose."""
