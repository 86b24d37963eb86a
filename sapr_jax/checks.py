"""Checks of arguments at the doors of the library: what must be, what is given, in one line."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.errors import InputError, one_line


def shown(value: Any, limit: int = 100) -> str:
  """Returns how a value is written in a message: one line of at most `limit` characters."""
  try:
    text = repr(value) if isinstance(value, str | jax.core.Tracer) else reprlib.repr(value)
  except Exception:  # of an object of the user's, or an integer that is too long
    text = f"a {type(value).__name__}"
  text = " ".join(ascii(text)[1:-1].split() if not text.isprintable() and "\n" not in text else text.split())
  return text if len(text) <= limit else f"{text[:limit]} ..."


def check_type(name: str, value: Any, kind: type, cure: str) -> None:
  """Raises `InputError` unless `value` is a `kind`; `cure` says where one comes from."""
  if not isinstance(value, kind):
    raise InputError(f"{name} must be a {kind.__name__}, got {shown(value)}; {cure}.")


def check_tree(name: str, tree: Any) -> None:
  """Raises `InputError` if JAX cannot go through `tree`, as its names do not compare."""
  try:
    jax.tree.structure(tree)
  except (TypeError, ValueError) as error:
    raise InputError(f"{name} must be a tree of arrays whose names are text, got {one_line(error, 100)}.") from error


def check_function(name: str, value: Any, cure: str) -> None:
  if not callable(value):
    raise InputError(f"{name} must be a function, got {shown(value)}; {cure}.")


def check_number(
  name: str, value: Any, must: str, is_good: Callable[[float], bool], *, cure: str = "", may_be_traced: bool = False
) -> None:
  """Raises `InputError` unless `value` is one finite real number and `is_good`, which `must` says in words.

  Of a traced one only the shape and dtype can be checked.
  """
  number = math.nan
  if is_number(value):
    if isinstance(value, jax.core.Tracer):
      if may_be_traced:
        return
      cure = "it cannot be a traced array: call this outside of jax.jit"
    else:
      with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
        number = float(value)
  if not math.isfinite(number) or not is_good(number):
    raise InputError(f"{name} must be {must}, got {shown(value)}{f'; {cure}' if cure else ''}.")


def check_integer(name: str, value: Any, at_least: int) -> None:
  if not is_integer(value) or not at_least <= value < 2**31:
    limit = " and below 2**31" if is_integer(value) and value > at_least else ""
    raise InputError(f"{name} must be an integer of at least {at_least}{limit}, got {shown(value)}.")


def check_dtype(name: str, value: Any) -> Any:
  """Returns the dtype; raises `InputError` if `value` is none."""
  if isinstance(value, type | str | np.dtype):
    with contextlib.suppress(TypeError, ValueError):
      return jnp.dtype(value)
  raise InputError(f"{name} must be a dtype, such as jnp.float32, got {shown(value)}.")


def check_array(name: str, value: Any, shape: tuple[int | None, ...] | None = None) -> None:
  """Raises `InputError` unless `value` holds real numbers, and has `shape` (None: any, for a size or all)."""
  try:
    array: Any = value if hasattr(value, "dtype") else np.asarray(value)
  except (OverflowError, TypeError, ValueError):
    raise InputError(f"{name} must have shape {_written(shape)}, got a ragged list.") from None
  if not is_real(array):
    raise InputError(f"{name} must hold real numbers, got {shown(value)}.")
  found = np.shape(array)
  if shape is not None and not (
    len(found) == len(shape) and all(b in (a, None) for a, b in zip(found, shape, strict=True))
  ):
    raise InputError(f"{name} must have shape {_written(shape)}, got {found}.")


def _written(shape: tuple[int | None, ...] | None) -> str:
  return "of an array" if shape is None else str(shape).replace("None", "n")


def check_concrete(name: str, tree: Any, function: str) -> None:
  """Raises `InputError` if an array in `tree` is traced."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
    raise InputError(f"{name} must be concrete, got a traced array; call {function} outside of jax.jit.")


def check_values(name: str, tree: Any, function: str) -> None:
  """Raises `InputError` if an array in `tree` is traced, or a shape alone."""
  check_concrete(name, tree, function)
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
    raise InputError(f"{name} must hold arrays with values, got shapes without numbers; give those that were trained.")


def check_key(key: Any) -> None:
  """Raises `InputError` unless `key` is one JAX random key, of the new or the old style."""
  is_array = isinstance(key, jax.Array | np.ndarray)
  is_new = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
  if not is_new and not (is_array and key.dtype == np.uint32 and key.shape in ((2,), (4,))):
    raise InputError(f"key must be one random key, such as jax.random.key(0), got {shown(key)}.")


def check_path(path: Any) -> pathlib.Path:
  """Returns the path; raises `InputError` if it is none, or of a store that is not a file system."""
  if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path) or not str(path):
    raise InputError(f"path must be a path of the file system, got {shown(path)}.")
  if "://" in str(path):
    raise InputError(f"path must be one of the file system, got {shown(path)}; copy from and to a store by its tool.")
  return pathlib.Path(path)


def is_integer(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
  """Returns whether `value` is one real number, also as an array without axes, traced or not."""
  is_one = isinstance(value, numbers.Real | np.ndarray | jax.Array) and getattr(value, "shape", ()) == ()
  return is_one and is_real(value) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
  """Returns whether a number or array, traced or not, holds real numbers; a shape alone holds none."""
  dtype = getattr(value, "dtype", None)
  if isinstance(value, jax.ShapeDtypeStruct):
    return False
  if not isinstance(dtype, np.dtype):  # none, that of random keys, or the descriptor of a class
    return isinstance(value, numbers.Real)
  return any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))
