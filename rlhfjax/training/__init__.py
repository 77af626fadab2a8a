"""Training: states, optimizers, compiled updates, the two loops, checkpoints and metrics."""
