"""Memory, compiler options and layers that make steps fast on CPUs. Nothing here applies to accelerators.

`config.fast_cpu = False` switches all of it off; docs/performance.md says what it gains.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapr_jax.models import with_fast_layers
from sapr_jax.runtime.devices import MappedStep, Step, is_cpu


def map_step(step: Step, mesh: Mesh, params: Any, *, fast: bool = True) -> MappedStep:
  """Maps a step of the network with these parameters over the devices; where they are CPUs, in its fast form."""
  if not (fast and is_cpu(mesh)):
    return MappedStep(step, mesh)
  return MappedStep(with_fast_layers(step), mesh, compiler_options(params))


_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1  # of mallopt(3)


def keep_memory() -> bool:
  """Lets the process keep the memory that it frees; to be called before JAX starts its threads.

  XLA allocates a program's temporary memory, hundreds of megabytes, for each call. glibc takes it from the kernel and
  gives it back every time, so that every step pays for a hundred thousand page faults.

  Returns:
    Whether it did: only with glibc, and where JAX has nothing but the CPU to run on.
  """
  if not _only_cpu():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library, or another system
    return False
  # One arena, as those of threads hold no large blocks; blocks from the heap, not mapped; a heap that never shrinks.
  return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def _only_cpu() -> bool:
  """Returns whether JAX will use the CPU, told without starting it."""
  config: Any = jax.config  # most releases do not declare its fields
  if platforms := config.jax_platforms:
    return platforms == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return not plugins and importlib.util.find_spec("libtpu") is None


_OPTION = "xla_cpu_experimental_ynn_fusion_type"
_TRIED_FROM = (0, 10)
"""JAX releases from here on run our steps with the option; 0.8.1 crashes with other values of it."""


def compiler_options(params: Any) -> dict[str, str]:
  """Returns options for `jax.jit` that suit a network with these parameters; none where JAX does not know them.

  XLA fuses the elementwise operations before a kernel's gradient into a transposition, and repeats them there in the
  worst order for the caches. As fusions of the YNNPACK library they stand alone. That library is slow at shifted slices
  though, so that networks with depthwise convolutions leave it the reductions only.
  """
  types = ["REDUCE"] if _has_depthwise(params) else ["REDUCE", "ELTWISE"]
  options = {_OPTION: ",".join(f"LIBRARY_FUSION_TYPE_{name}" for name in types)}
  return options if _is_known(options[_OPTION]) else {}


def _has_depthwise(params: Any) -> bool:
  shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
  return any(len(shape) == 4 and shape[2] == 1 and shape[3] > 1 and shape[:2] != (1, 1) for shape in shapes)


@functools.cache
def _is_known(value: str) -> bool:
  """Returns whether this release of JAX takes the option: it is experimental, and may go."""
  if jax.__version_info__ < _TRIED_FROM:
    return False
  try:
    jax.jit(lambda x: x + 1, compiler_options={_OPTION: value}).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
  except Exception:  # of jaxlib's own types, which differ between releases
    return False
  return True
