"""Training: state, the three steps, devices, schedules, and the one loop."""

from sapr_jax.training.compilation_cache import use_compilation_cache
from sapr_jax.training.cpu import keep_memory, with_fast_layers
from sapr_jax.training.processes import AgreedError
from sapr_jax.training.run import run

__all__ = ["AgreedError", "keep_memory", "run", "use_compilation_cache", "with_fast_layers"]
