"""Principal vectors."""
