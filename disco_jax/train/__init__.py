"""Training: optimisers, steps, the loop, checkpoints."""
