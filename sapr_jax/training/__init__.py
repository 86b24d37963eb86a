"""Training: state, the three steps, devices, schedules, and the one loop."""

from sapr_jax.training.processes import AgreedError
from sapr_jax.training.run import run

__all__ = ["AgreedError", "run"]
