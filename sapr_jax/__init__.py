"""Structured pruning for JAX and Flax: partial regularization, channel surgery, and the training around them."""
