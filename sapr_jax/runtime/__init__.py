"""Surroundings of a run, usable by any other loop: devices, processes, interruption, progress, compiled programs."""

from sapr_jax.runtime.compilation_cache import use_compilation_cache
from sapr_jax.runtime.cpu import keep_memory
from sapr_jax.runtime.devices import MappedStep, data_mesh, replicate
from sapr_jax.runtime.interruption import Interruption
from sapr_jax.runtime.progress import Progress, say

__all__ = [
  "Interruption",
  "MappedStep",
  "Progress",
  "data_mesh",
  "keep_memory",
  "replicate",
  "say",
  "use_compilation_cache",
]
