"""What touches parameters, gradients and the optimizer: on one device, or sharded by DeepSpeed."""
