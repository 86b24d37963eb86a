"""Every step of a run on the device at hand, its results beside those of a CPU in float32.

    python -m benchmarks.agreement [--quick] [ROW ...]

A call of two steps starts from the same state on both. The device computes as a run does; its first form, float32 at
the highest precision, is to agree but for the order of sums, the others within the rounding of what they compute in. On
a CPU, what a run does there (`fast_cpu`) is compared with what it does with that switched off.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks import training_pieces
from benchmarks.measuring import goal, measure_rows, table
from sapr_jax import prune
from sapr_jax.method import (
  ArchitectureGenerator,
  GeneratorState,
  SearchOptions,
  macs_budget,
  regularize_by_penalty,
  regularize_by_prox,
)
from sapr_jax.runtime import keep_memory
from sapr_jax.runtime.devices import AXIS, Step
from sapr_jax.training import steps
from sapr_jax.training.inputs import Shared

WEIGHTS, REGULARIZED, GENERATOR, EVALUATION = "weight step", "with regularization", "generator step", "evaluation"
FINE_TUNING, PRUNED = "fine-tuning", "pruned network"
STEPS = (WEIGHTS, REGULARIZED, GENERATOR, EVALUATION, FINE_TUNING, PRUNED)
FORMS = {
  "float32, highest precision": ("float32", "highest", 1e-3),
  "float32": ("float32", None, 0.05),
  "bfloat16": ("bfloat16", None, 0.2),
}
"""Name -> (dtype, precision of matrix products, greatest relative difference that is allowed)."""
GAMMA = 0.1  # much more than in a run, so that the regularization shows beside the loss
P = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
  """A network, and which steps of it are compared."""

  network: str
  title: str
  steps: tuple[str, ...] = STEPS
  batch: int = 32
  image_size: int = 32
  width_multiplier: float = 1.0


ROWS = {
  "resnet8": Row("resnet8", "ResNet-8"),
  # Depthwise convolutions; its programs take long to compile.
  "mobilenetv2_cifar": Row("mobilenetv2_cifar", "MobileNet-V2 (CIFAR)", (REGULARIZED, PRUNED)),
}


def main() -> None:
  keep_memory()
  measured = measure_rows(__doc__, "agreement", "rows", ROWS, measure)
  print(difference_table(measured))
  if missed := misses(measured):
    sys.exit(f"error: results differ from those of a CPU: {'; '.join(missed)}")


# Measuring.


def measure(row: Row, quick: bool) -> dict[str, Any]:
  """Compares the steps of a network; ends the program where a result is not finite."""
  if quick:
    row = dataclasses.replace(row, network="resnet8", batch=4, image_size=8, width_multiplier=0.25)
    row = dataclasses.replace(row, steps=(FINE_TUNING, PRUNED))  # what compiles fast of a step and of an evaluation
  forms = dict(list(FORMS.items())[-1:]) if quick else FORMS
  meshes = [Mesh(np.asarray(jax.devices(platform)[:1]), (AXIS,)) for platform in (None, "cpu")]
  differences: dict[str, dict[str, float]] = {name: {} for name in row.steps}
  for name in row.steps:
    reference = result(row, name, "float32", None, meshes[1], fast_cpu=False)
    for form, (dtype, precision, _) in forms.items():
      found = difference(result(row, name, dtype, precision, meshes[0]), reference)
      if not math.isfinite(found):
        sys.exit(f"error: {row.title}, {name}, {form}: a result is not finite")
      differences[name][form] = found
  return {"title": row.title, "batch": row.batch, "differences": differences}


def result(row: Row, name: str, dtype: str, precision: str | None, mesh: Mesh, *, fast_cpu: bool = True) -> Any:
  """Returns what a call of two steps changes, and what it measures: name -> arrays on the host."""
  made = training_pieces.pieces(
    row.network, dtype=dtype, width_multiplier=row.width_multiplier, image_size=row.image_size, images=4 * row.batch
  ).on(mesh)
  step, state, variables = step_to_compare(made, name)
  first = jax.device_get(compared(state))
  with jax.default_matmul_precision(precision):
    call = made.call(step, state, row.batch, variables=variables, steps_per_call=2, fast_cpu=fast_cpu)
    state, metrics = jax.device_get(call())
  # Which of nearly equal logits is the largest may differ.
  measured = {name: value for name, value in metrics.items() if name not in ("accuracy", "correct")}
  return jax.tree.map(lambda new, old: new - old, compared(state), first) | {"metrics": measured}


def compared(state: Any) -> dict[str, Any]:
  """Returns the parts of a state that a step is for."""
  return {part: getattr(state, part) for part in ("params", "batch_stats") if hasattr(state, part)}


def step_to_compare(made: training_pieces.Pieces, name: str) -> tuple[Step, Any, Any]:
  """Returns a step, its first state and `shared.variables`."""
  model, graph, variables, preprocessing = made.model, made.graph, made.variables, made.preprocessing
  if name in (FINE_TUNING, PRUNED):
    model, variables = prune(model, variables, graph, made.masks)
    made = dataclasses.replace(made, model=model, variables=variables)
  tx = training_pieces.weight_tx()
  if name in (WEIGHTS, FINE_TUNING):
    return made.weight_step(tx), made.state(tx), None
  if name == REGULARIZED:  # in both forms; the second follows the optimizer
    prox = regularize_by_prox(graph, training_pieces.LEARNING_RATE, GAMMA, momentum=training_pieces.MOMENTUM)
    tx = optax.chain(regularize_by_penalty(graph, GAMMA), tx, prox)
    return made.weight_step(tx), made.state(tx), None
  if name == GENERATOR:
    generator, sgd = ArchitectureGenerator.for_graph(graph), optax.sgd(1.0)  # Adam's first steps are but signs
    options = SearchOptions(macs_budget(graph, P))
    step = steps.generator_step(model, generator, graph, sgd, preprocessing, options)
    return step, GeneratorState.create(generator.init(jax.random.key(0)), sgd), variables
  evaluation = steps.evaluation_step(model, preprocessing)

  def evaluate(sums: Any, shared: Shared, rows: jax.Array) -> Any:
    sums, metrics = evaluation(sums, shared, (rows, jnp.ones(rows.shape)))
    logits = model.apply(shared.variables, preprocessing.normalize(shared.read(rows)[0]), train=False)
    return sums, {**metrics, "logits": logits}

  return evaluate, {name: jnp.zeros(()) for name in ("correct", "loss", "count")}, variables


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
  """Returns the norm of the difference over that of what is expected, of the part where it is greatest.

  Not finite if an array is not.
  """

  def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

  ratios = [
    np.linalg.norm(flat(found[part]) - flat(tree)) / np.linalg.norm(flat(tree)) for part, tree in expected.items()
  ]
  return float(np.max(ratios))


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  lines = []
  for row in report["rows"].values():
    for form in next(iter(row["differences"].values())):
      worst, most = max(found[form] for found in row["differences"].values()), FORMS[form][2]
      lines.append(
        goal(worst <= most, f"{row['title']}, {form}: at most {worst:.1e} apart, asked for at most {most:g}.")
      )
  return [difference_table(report["rows"]), "\n".join(lines)]


def difference_table(rows: Mapping[str, Any]) -> str:
  """Returns the relative differences of each step."""
  lines = [
    [f"{row['title']}: {name}", *(f"{found[form]:.1e}" if form in found else "" for form in FORMS)]
    for row in rows.values()
    for name, found in row["differences"].items()
  ]
  return table(["step", *FORMS], lines)


def misses(rows: Mapping[str, Any]) -> list[str]:
  """Returns which results are further apart than is allowed."""
  return [
    f"{row['title']}, {name}, {form}: {found[form]:.1e} instead of at most {most:g}"
    for row in rows.values()
    for name, found in row["differences"].items()
    for form, (_, _, most) in FORMS.items()
    if form in found and found[form] > most
  ]


if __name__ == "__main__":
  main()
