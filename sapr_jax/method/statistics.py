"""Running statistics of a network that was cut, measured again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from sapr_jax.channels import check_module, check_variables, errors_of_model, is_nnx
from sapr_jax.checks import check_function, is_real, shown
from sapr_jax.errors import InputError


def renew_statistics(model: Any, variables: Any = None, batches: Any = None, renew: Any = None) -> Any:
  """Measures the running statistics of a network again, on some batches.

  The activations of a network that was cut differ from those of the one whose statistics it inherits. With a momentum
  of 0.9 some 50 batches are enough, with 0.99 some 500.

  Args:
    model: The small network.
    variables: Its variables; left out for a module of NNX, `renew_statistics(module, batches, renew)`.
    batches: Pytrees of arrays, of one shape.
    renew: (model, variables, batch) -> the collections that training mode changes, such as `model.apply(variables,
      batch["image"], train=True, mutable=["batch_stats"])[1]`. With NNX (module, batch) -> None: it runs a copy of the
      module, which is in training mode, as in `lambda module, batch: module(batch["image"])`. It is compiled.

  Returns:
    The variables with the new statistics; with NNX a module that has them.

  Raises:
    InputError: If there is no batch, or `renew` returns something else.
  """
  if is_nnx(model):
    return _renew_module(model, *((batches, renew) if variables is None else (variables, batches)))
  check_module(model)
  check_variables(variables)
  check_function("renew", renew, "it takes (model, variables, batch) and returns {'batch_stats': ...}")

  @jax.jit
  def step(variables: dict[str, Any], batch: Any) -> dict[str, Any]:
    changed = renew(model, variables, batch)
    if not isinstance(changed, Mapping) or not changed or not set(changed) <= set(variables) - {"params"}:
      raise InputError(
        f"renew must return collections of the variables, such as batch_stats, got {shown(changed)}; it is the second"
        " part of what model.apply(..., mutable=['batch_stats']) returns."
      )
    return {**variables, **changed}

  return _after(step, variables, batches)


def _after(step: Any, variables: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, Any]:
  renewed = dict(variables)
  for batch in some(batches):
    with errors_of_model("renew, the model, its variables and a batch"):
      renewed = step(renewed, batch)
  return renewed


def _renew_module(module: Any, batches: Any, renew: Any) -> Any:
  from sapr_jax.channels import nnx  # takes a while to import

  check_function("renew", renew, "it takes (module, batch), and runs the module")

  @jax.jit
  def step(variables: dict[str, Any], batch: Any) -> dict[str, Any]:
    return {**variables, **nnx.statistics_after(module, renew, variables, batch)}

  return nnx.with_variables(module, _after(step, nnx.variables_of(module), batches))


def some(batches: Iterable[Any]) -> Iterator[Any]:
  """Yields the batches; raises `InputError` if there is none."""
  # An array has `__iter__` even if it has no axis.
  is_array = hasattr(batches, "dtype")
  if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping) or is_array:
    raise InputError(f"batches must be an iterable of trees of arrays, such as a list, got {shown(batches)}.")
  found = False
  for batch in batches:
    if not all(map(is_real, jax.tree.leaves(batch))):
      raise InputError(f"batches must hold trees of arrays of numbers, got {shown(batch)}.")
    found = True
    yield batch
  if not found:
    raise InputError("batches must hold at least one batch, got none; an iterator that was used up has none.")
