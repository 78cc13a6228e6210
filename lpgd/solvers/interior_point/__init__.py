"""The batched interior-point method in torch."""
