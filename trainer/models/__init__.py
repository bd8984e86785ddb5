"""The network, its optimizers, and the fast training step on CPUs."""
