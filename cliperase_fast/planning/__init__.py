"""What a step on many GPUs needs, computed before it is run."""
