"""The cost of a step on many GPUs, computed before it is run."""
