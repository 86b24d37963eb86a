"""The arguments that a network is applied to, as it is traced: arrays without values, everything else as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.checks import check_dtype, check_tree, is_integer, shown
from sapr_jax.errors import InputError, one_line


@dataclasses.dataclass(frozen=True)
class Call:
  """Arguments of a network, any pytrees.

  Attributes:
    args: Positional arguments. Their arrays are `jax.ShapeDtypeStruct`s; other leaves are passed on as they are.
    kwargs: Keyword arguments, likewise.
  """

  args: tuple[Any, ...]
  kwargs: Mapping[str, Any]

  @property
  def arrays(self) -> list[jax.ShapeDtypeStruct]:
    """The arrays among the arguments, in the order of `jax.tree.leaves`."""
    return [leaf for leaf in jax.tree.leaves((self.args, dict(self.kwargs))) if _is_abstract(leaf)]

  def filled(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with `arrays` in the place of those of this call."""
    values = iter(arrays)
    return jax.tree.map(lambda leaf: next(values) if _is_abstract(leaf) else leaf, (self.args, dict(self.kwargs)))

  def arrays_of(self, batch: Any) -> list[Any]:
    """Returns the arrays of a batch, which go in the place of those of this call.

    Raises:
      InputError: If it has more or fewer.
    """
    arrays = jax.tree.leaves(batch)
    if len(arrays) != len(self.arrays):
      raise InputError(
        f"a batch must hold the arrays of the call that was traced, and nothing else, such as labels: {self}, got"
        f" {_text(abstract_arrays(batch))}."
      )
    return arrays

  def with_batch(self, size: int) -> Call:
    """Returns the call on a batch of this size, in all arrays that begin with the axis of the first array's batch."""
    first = self.arrays[0].shape[:1]
    arrays = [a if a.shape[:1] != first else jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in self.arrays]
    return Call(*self.filled(arrays)) if first else self

  def to_json(self) -> dict[str, Any]:
    """Returns the call in JSON types.

    Raises:
      InputError: If an argument holds something else than arrays, JSON values, and containers of these.
    """
    return {
      "args": [_to_json(f"argument {i}", value) for i, value in enumerate(self.args)],
      "kwargs": {name: _to_json(name, value) for name, value in self.kwargs.items()},
    }

  @classmethod
  def from_json(cls, document: Mapping[str, Any]) -> Call:
    """Returns the call that `to_json` wrote."""
    return cls(
      tuple(map(_from_json, document["args"])), {name: _from_json(v) for name, v in document["kwargs"].items()}
    )

  def arrays_in_words(self) -> str:
    """Returns the arrays alone: `float32[1,32,32,3]`."""
    return ", ".join(_text(array) for array in self.arrays)

  def __str__(self) -> str:
    """The arguments as they are written in a call: `float32[1,32,32,3], train=False`."""
    args = [_text(value) for value in self.args]
    return ", ".join([*args, *(f"{name}={_text(value)}" for name, value in self.kwargs.items())])


def call_of(
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  *,
  input_shape: Sequence[int] | None = None,
  input_dtype: Any = jnp.float32,
  apply_kwargs: Mapping[str, Any] | None = None,
) -> Call:
  """Returns the call with these arguments, as `trace_channels` takes them.

  Args:
    args: Arrays or `jax.ShapeDtypeStruct`s, any pytrees. A tuple of integers alone is an input shape.
    kwargs: Further arguments, likewise.
    input_shape: In the place of `args`: shape of one array; the batch is traced as 1.
    input_dtype: Its dtype.
    apply_kwargs: Further keyword arguments.

  Raises:
    InputError: If there is no array, or `input_shape` is none.
  """
  check_tree("The inputs of the model", (tuple(args), dict(kwargs)))
  match args:
    case [(tuple() | list()) as shape] if not any(map(is_array, jax.tree.leaves(shape))):
      if input_shape is not None:
        raise InputError(f"input_shape must be given once, got {shown(shape)} and {shown(input_shape)}.")
      args, input_shape = (), shape
  if input_shape is not None:
    args = (abstract_image(input_shape, input_dtype), *args)
  call = Call(*abstract_arrays((tuple(args), {**checked_kwargs(apply_kwargs), **kwargs})))
  if not call.arrays:
    raise InputError(
      "The inputs of the model must be arrays or jax.ShapeDtypeStructs, or input_shape=(1, 32, 32, 3), got"
      f" {shown(call.args[0] if len(call.args) == 1 else call.args or dict(kwargs))}."
    )
  return call


def abstract_image(input_shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
  """Returns the abstract input of batch size 1."""
  shape = tuple(input_shape) if isinstance(input_shape, Sequence | np.ndarray) else ()
  if len(shape) < 2 or not all(is_integer(size) and 0 < size < 2**31 for size in shape):
    raise InputError(f"input_shape must be positive sizes, such as (1, 32, 32, 3), got {shown(input_shape)}.")
  return jax.ShapeDtypeStruct((1, *map(int, shape[1:])), check_dtype("input_dtype", dtype))


def checked_kwargs(apply_kwargs: Any) -> dict[str, Any]:
  """Returns `apply_kwargs` as a dictionary; raises `InputError` unless it maps names to values."""
  if apply_kwargs is None:
    return {}
  if not isinstance(apply_kwargs, Mapping) or not all(isinstance(name, str) for name in apply_kwargs):
    raise InputError(f"apply_kwargs must map names to values, such as {{'train': False}}, got {shown(apply_kwargs)}.")
  return dict(apply_kwargs)


@contextlib.contextmanager
def errors_of_model(
  parts: str,
  kinds: type[Exception] = Exception,
  cure: str = "Pass the variables of this model, all collections, made for such inputs",
) -> Iterator[None]:
  """Turns what a model raises into an `InputError`. It may be anything, as the model's code is the user's."""
  try:
    yield
  except kinds as error:
    reason = one_line(error, 500).partition(" (https://")[0].rstrip(".") or type(error).__name__
    if isinstance(error, TypeError) and "required" in reason and "missing" in reason:
      cure = "Pass these arguments too, as the model takes them"
    raise InputError(f"{parts} do not fit together: {reason}. {cure}.") from error


def _is_abstract(leaf: Any) -> bool:
  return isinstance(leaf, jax.ShapeDtypeStruct)


def is_array(leaf: Any) -> bool:
  """Says whether an argument is traced, and not passed on as it is."""
  return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def abstract_arrays(tree: Any) -> Any:
  """Replaces the arrays of a tree by their shapes and the dtypes that JAX would give them."""

  def abstract(leaf: Any) -> Any:
    if not is_array(leaf):
      return leaf
    try:
      return jax.eval_shape(lambda x: x, leaf)
    except TypeError:
      raise InputError(f"The inputs of the model must be numbers, got an array of {leaf.dtype}.") from None

  return jax.tree.map(abstract, tree)


def _text(value: Any) -> str:
  def text(leaf: Any) -> Any:
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]" if _is_abstract(leaf) else leaf

  return shown(jax.tree.map(text, value)).replace("'", "")


def _to_json(name: str, value: Any) -> Any:
  if _is_abstract(value) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
    return {"array": [list(value.shape), value.dtype.name]}
  if type(value) in (list, tuple):
    return {type(value).__name__: [_to_json(name, entry) for entry in value]}
  if type(value) is dict and all(isinstance(key, str) for key in value):
    return {"dict": {key: _to_json(name, entry) for key, entry in value.items()}}
  try:
    if json.loads(json.dumps(value)) == value:
      return {"value": value}
  except (TypeError, ValueError):
    pass
  raise InputError(f"{name} must be of arrays and JSON values to be written, got a {type(value).__name__}.")


def _from_json(value: Mapping[str, Any]) -> Any:
  ((kind, content),) = value.items()
  if kind == "array":
    return jax.ShapeDtypeStruct(tuple(content[0]), jnp.dtype(content[1]))
  if kind == "dict":
    return {key: _from_json(entry) for key, entry in content.items()}
  if kind in ("list", "tuple"):
    entries = map(_from_json, content)
    return list(entries) if kind == "list" else tuple(entries)
  return content
