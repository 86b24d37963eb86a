"""What several folders share: tiny networks, and how tests are compiled."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import normalization
from jax_options import jax_options

import sapr_jax as sapr

# Nothing of ours may rest on implicit promotion.
jax.config.update("jax_numpy_dtype_promotion", "strict")


def _compiled_programs() -> str:
  """Returns the folder that the workers of this run, and the commands that tests start, share."""
  if "PYTEST_XDIST_WORKER" in os.environ:
    return os.environ["JAX_COMPILATION_CACHE_DIR"]
  folder = tempfile.mkdtemp(prefix="compiled_tests_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


# Most of the time of the tests is the compiler's, and the programs run a few steps: here, and in the processes that
# tests start, none is optimized, and kernels are made in the compiler's older way, which takes a third of the time.
# Where programs run for longer (`optimized`), they are optimized a little. The flags count from the first program on.
_FLAGS = (
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
  "--xla_backend_optimization_level=1",
)
os.environ["XLA_FLAGS"] = " ".join((*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS))
for _option, _value in (
  ("jax_disable_most_optimizations", True),
  ("jax_compilation_cache_dir", _compiled_programs()),
  ("jax_persistent_cache_min_compile_time_secs", 0.1),
):
  jax.config.update(_option, _value)
  os.environ[_option.upper()] = str(_value)


def _with_standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(function)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return wrapped


# Code of others that does: optax raises a float to the power of an int32; flax normalizes bfloat16 by float32, and
# divides a sum by the int64 size of its window.
for _module, _name in (
  (optax.tree, "bias_correction"),
  (normalization, "_compute_stats"),
  (normalization, "_normalize"),
  (nn, "avg_pool"),
):
  setattr(_module, _name, _with_standard_promotion(getattr(_module, _name)))


@dataclasses.dataclass(frozen=True)
class Network:
  """A model with all that the functions under test want."""

  model: nn.Module
  variables: Any
  graph: sapr.ChannelGraph
  input_shape: tuple[int, ...]

  @property
  def params(self) -> Any:
    return self.variables["params"]


def _network(model: nn.Module, input_shape: tuple[int, ...], **trace_options: Any) -> Network:
  # Drawn by NumPy, as compiling `init` takes longer than all that follows.
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(input_shape))

  def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    scale = (2 / max(np.prod(leaf.shape[:-1]), 1)) ** 0.5  # He et al.
    return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

  variables = jax.tree.map(draw, shapes)
  return Network(model, variables, sapr.trace_channels(model, variables, input_shape, **trace_options), input_shape)


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """For programs that run for longer than the compiler does, here and in commands."""
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "False")
  with jax_options(jax_disable_most_optimizations=False):
    yield


@pytest.fixture(scope="session")
def tiny() -> Network:
  """ResNet-8 with 4, 8 and 16 channels on 8x8 gray images."""
  return _network(sapr.models.create("resnet8", width_multiplier=0.25), (1, 8, 8, 1))


class Bottleneck(nn.Module):
  """Two pointwise convolutions around a 3x3 one, and a flattened Dense layer that reads the last."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for name, features, kernel in (("reduce", 4, 1), ("middle", 3, 3), ("expand", 2, 1)):
      x = nn.relu(nn.Conv(features, (kernel, kernel), name=name)(x))
    return nn.Dense(5, name="head")(x.reshape((x.shape[0], -1)))


@pytest.fixture(scope="session")
def bottleneck() -> Network:
  """Groups on both axes of one kernel, and one that a flattened axis carries."""
  return _network(Bottleneck(), (1, 4, 4, 2), select="unjoined")
