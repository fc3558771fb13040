"""Backend "triton". Import its modules only where Triton is known to be there: see `ops/registry.py`."""
