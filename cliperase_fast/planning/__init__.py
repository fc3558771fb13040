"""Compute the cost of a step on many GPUs before it runs."""
