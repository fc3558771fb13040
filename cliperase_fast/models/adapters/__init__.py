"""One interface over each kind of model."""
