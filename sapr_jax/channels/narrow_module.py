"""The pruned network of Flax linen: an unchanged module with fewer channels in some of its layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from sapr_jax.channels.dense_program import DenseProgram, are_cuts, grown, program_errors_in_one_line
from sapr_jax.channels.narrow_program import Cut
from sapr_jax.channels.trees import abstract
from sapr_jax.checks import is_integer, shown
from sapr_jax.errors import InputError

Widths = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


class NarrowModule(nn.Module):
  """Runs an unchanged Flax module with fewer channels in some of its layers.

  Its variables have the same paths as those of `base`, and smaller shapes. It is used like any module: initialized,
  applied in training mode, differentiated, put into another one. There are two ways to narrow a module. Where its code
  takes widths from the fields `features` of its layers, they get other values (`widths`). Where code computes a width
  or holds it as a number, the program of the dense module is evaluated with the shapes that are left (`cuts`); then
  only `__call__` can be run, and each call outside of `jax.jit` traces it again.

  Attributes:
    base: The module as its author wrote it.
    widths: Path of a layer, with slashes -> its changed fields: `(("block1/conv1", (("features", 13),)), ...)`.
    cuts: Axes of variables that are cut: `(("params/attention/key/kernel", 1, 12, ((12, 8),)), ...)`: the axis had 12
      entries, which are 12 channels, of which 8 stay. Relative to `base` with `widths`.
  """

  base: nn.Module
  widths: Widths = ()
  cuts: tuple[Cut, ...] = ()

  def __post_init__(self) -> None:
    check_module(self.base)
    if not _are_widths(self.widths):
      raise InputError(
        f"widths must be (path of a layer, ((field, size), ...)) for each layer, got {shown(self.widths)}; prune"
        " returns such a module."
      )
    if not are_cuts(self.cuts):
      raise InputError(
        f"cuts must be (path of a variable, axis, size, ((size, kept), ...)) for each axis, got {shown(self.cuts)};"
        " prune returns such a module."
      )
    super().__post_init__()

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._evaluate(*args, **kwargs) if self.cuts else self._run_narrowed(*args, **kwargs)

  def _run_narrowed(self, *args: Any, **kwargs: Any) -> Any:
    changes = {path: dict(fields) for path, fields in self.widths}
    root = len(self.path)

    def narrow(next_fun, args, kwargs, context):
      layer = context.module
      fields = changes.get("/".join(layer.path[root:])) if hasattr(layer, "features") else None
      if fields is None or all(getattr(layer, name) == value for name, value in fields.items()):
        return next_fun(*args, **kwargs)
      return getattr(layer.clone(parent=layer.scope, **fields), context.method_name)(*args, **kwargs)

    with nn.intercept_methods(narrow):
      return self.base.copy(parent=self.scope)(*args, **kwargs)

  def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
    """Evaluates the program of the dense module."""
    scope: Any = self.scope
    module = NarrowModule(self.base, self.widths, parent=None)
    # The keys of the dense module, which then draws the same numbers; where it is called again, others.
    new = {name: self.make_rng(name) for name in scope.rngs}
    rngs = {name: key if scope.rng_counters[name] > 1 else scope.rngs[name] for name, key in new.items()}
    is_new = self.is_initializing()
    mutable = False if is_new else scope.mutable

    def apply(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
      found = module.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
      return (found, {}) if mutable is False else found

    with program_errors_in_one_line():
      variables = dict(module.init(rngs, *args, **kwargs) if is_new else self.variables)
      whole = abstract(variables) if is_new else grown(variables, self.cuts)
      dense = DenseProgram(apply, whole, rngs, args, kwargs, training=bool(rngs))
      if is_new:
        variables = dense.cut(variables, self.cuts)
      results, updates = dense.run(variables, self.cuts, rngs, args, kwargs)
    for collection, tree in (variables if is_new else updates).items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)
    return results


def check_module(model: Any) -> None:
  """Raises `InputError` unless `model` is a module of Flax linen."""
  if isinstance(model, nn.Module):
    return
  if isinstance(model, type):
    raise InputError(f"model must be a module, got the class {model.__name__}; make one, {model.__name__}(...).")
  kind = "an NNX module" if any(cls.__module__ == "flax.nnx.module" for cls in type(model).__mro__) else shown(model)
  raise InputError(f"model must be a Flax linen module, such as nn.Dense(3), got {kind}; wrap other code in a module.")


def _are_widths(widths: Any) -> bool:
  try:
    return all(
      isinstance(path, str) and all(isinstance(name, str) and is_integer(size) and size > 0 for name, size in fields)
      for path, fields in widths
    )
  except (TypeError, ValueError):
    return False
