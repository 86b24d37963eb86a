"""What pruning makes of a network of the zoo, and the page that lists it."""

from __future__ import annotations

import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

import sapr_jax as sapr
from tests.zoo.networks import ENTRIES, Entry, network

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "supported.md"
TOLERANCE = 1e-10
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_HEAD = f"""# Supported networks

Written by `python -m tests.zoo`; the slow tests check every row. Networks of other packages, in small configurations,
are pruned by the plain call, `sapr.trace_channels(module, variables, **inputs)` and `sapr.prune`: random masks drop two
fifths of the channels of every group that the default, `select="blocks"`, offers. *Share*: of the multiply-accumulates,
those in layers that touch a group. *Error*: largest difference of an output from the masked network's, relative to its
largest entry, in float64; the test demands {TOLERANCE:g}. *Form*: "module" where the network's own code takes the new
widths, "program" where it holds them as numbers, and the pruned network evaluates the dense one's program.

What is not understood stays whole, and `graph.explain()` says why. Widths of queries and keys stay, as they are summed
over without a stored kernel. So do streams with a layer normalization, which averages over them.

| network | package | groups | share, % | MACs left, % | form | error |
|---|---|---:|---:|---:|---|---:|
"""


class Row(NamedTuple):
  """What was found of one network: its cells in the page, and the error as a number."""

  cells: tuple[str, ...]
  error: float


def measure(name: str, entry: Entry) -> Row:
  """Prunes one network, and compares it with the masked one."""
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    module, variables, inputs = network(entry)
    graph = sapr.trace_channels(module, variables, **inputs)
    rng = np.random.default_rng(1)
    masks = {
      g.name: (np.argsort(np.argsort(rng.uniform(size=g.size))) >= int(0.4 * g.size)) * 1.0 for g in graph.groups
    }
    small, small_variables = sapr.prune(module, variables, graph, masks)
    if graph.macs(masks) != (counted := sapr.count_macs(small, small_variables, **inputs)):
      raise AssertionError(f"{name}: {graph.macs(masks)} MACs were predicted, {counted} counted")
    masked = {**variables, "params": sapr.mask_params(variables["params"], graph, masks)}
    error = _difference(_run(small, small_variables, inputs), _run(module, masked, inputs))
  shares = [f"{100 * part / graph.macs():.0f}" for part in (graph.prunable_macs(), graph.macs(masks))]
  form = "program" if small.cuts else "module"
  return Row((name, entry.package, str(len(graph.groups)), *shares, form), error)


def _run(module: Any, variables: Any, inputs: Any) -> list[Any]:
  static = {name: value for name, value in inputs.items() if not isinstance(value, jax.Array)}
  arrays = {name: value for name, value in inputs.items() if isinstance(value, jax.Array)}
  apply = jax.jit(lambda v, x: module.apply(v, **x, **static), compiler_options=_QUICK)
  return jax.tree.leaves(apply(variables, arrays))


def _difference(got: list[Any], want: list[Any]) -> float:
  assert len(got) == len(want) > 0
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


def text() -> str:
  """Measures all networks, and returns the page."""
  lines = []
  for name, entry in ENTRIES.items():
    row = measure(name, entry)
    lines.append(f"| {' | '.join(row.cells)} | {row.error:.0e} |\n")
    sys.stderr.write(lines[-1])
  return _HEAD + "".join(lines)
