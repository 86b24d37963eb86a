"""Cost of the method: an epoch with generator and regularization beside the same epoch without.

    python -m benchmarks.method_cost [--quick] [NETWORK ...]

Times the steps of a run on random images that lie on the device, and adds up an epoch of the data set from them. A CPU
gets few images, and small ones of ImageNet: times that grow with the images are multiplied up to the size of the
experiment, the others are not.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import training_pieces
from benchmarks.measuring import goal, measure_rows, median_ratio, shown, table, time_in_turns
from sapr_jax.configs import resnet56_cifar10
from sapr_jax.method import (
  ArchitectureGenerator,
  GeneratorState,
  SearchOptions,
  macs_budget,
  project_to_budget,
  regularize_by_penalty,
  split_by_group,
)
from sapr_jax.runtime import keep_memory, replicate
from sapr_jax.runtime.devices import Step
from sapr_jax.training import steps
from sapr_jax.training.inputs import Shared
from sapr_jax.training.state import TrainState

WEIGHTS, METHOD, GENERATOR, EVALUATION = "weight step", "with regularization", "generator step", "evaluation"
OPTIMIZER, PENALTY, PROXIMAL, MASKS = "optimizer", "penalty", "proximal step", "masks"
TIMED = (WEIGHTS, METHOD, GENERATOR, EVALUATION, OPTIMIZER, PENALTY, PROXIMAL, MASKS)
ADDED = (GENERATOR, PENALTY, MASKS, EVALUATION)

_CONFIG = resnet56_cifar10.get_config()
GENERATOR_SHARE, EVALUATED_EVERY = _CONFIG.generator.data_share, _CONFIG.evaluate.every_epochs
"""Of the images, and epochs: as in all experiments of the paper."""
GOAL_EPOCH, GOAL_PENALTY = 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class Network:
  """A network of the paper's experiments, and the size at which it is measured.

  Attributes:
    name: A name in `sapr_jax.models.MODELS`.
    title: What the table calls it.
    p: Share of the prunable MACs to keep.
    batch: Images of a step in the experiment, of the weights and of the generator.
    image_size: Height and width in the experiment.
    train_images: Of the data set.
    test_images: Of the data set.
    cpu: Batch and image size that a CPU measures.
  """

  name: str
  title: str
  p: float
  batch: int
  image_size: int
  train_images: int
  test_images: int
  cpu: tuple[int, int]


CIFAR, IMAGENET = (128, 32, 50_000, 10_000), (256, 224, 1_281_167, 50_000)
NETWORKS = (
  Network("resnet20", "ResNet-20", 0.48, *CIFAR, cpu=(128, 32)),
  Network("resnet56", "ResNet-56", 0.48, *CIFAR, cpu=(64, 32)),
  Network("mobilenetv2_cifar", "MobileNet-V2 (CIFAR)", 0.54, *CIFAR, cpu=(32, 32)),
  Network("resnet50", "ResNet-50", 0.37, *IMAGENET, cpu=(8, 64)),
  Network("mobilenetv2", "MobileNet-V2", 0.65, *IMAGENET, cpu=(16, 64)),
  Network("resnet34", "ResNet-34", 0.54, *IMAGENET, cpu=(8, 64)),
  Network("resnet101", "ResNet-101", 0.41, *IMAGENET, cpu=(8, 64)),
)
_LONG_ON_CPU = ("resnet34", "resnet101")
"""Compiling these for a CPU takes minutes; they are measured there on request."""


def main() -> None:
  keep_memory()  # as a run does on CPUs
  networks = {network.name: network for network in NETWORKS}
  on_cpu = jax.devices()[0].platform == "cpu"
  default = [name for name in networks if not (on_cpu and name in _LONG_ON_CPU)]
  measured = measure_rows(__doc__, "method_cost", "networks", networks, measure, default)
  print(f"{time_table(measured)}\n\n{cost_table(measured)}")


# Measuring.


def measure(network: Network, quick: bool) -> dict[str, Any]:
  """Times everything that an epoch with the method is made of."""
  accelerated, large = jax.devices()[0].platform != "cpu", network.image_size == 224
  batch, image_size = (network.batch, network.image_size) if accelerated else network.cpu
  if quick:
    network, batch, image_size = dataclasses.replace(network, name="resnet8"), 4, 8
  dtype = "bfloat16" if accelerated and large else "float32"
  per_call = (10 if large else 50) if accelerated else 1
  size: Any = {"image_size": image_size, "width_multiplier": 0.25 if quick else 1.0}
  made = training_pieces.pieces(network.name, dtype=dtype, images=max(batch, 256), **size)
  calls = {
    name: made.call(step, state, batch, variables=variables, steps_per_call=per_call)
    for name, (step, state, variables) in steps_to_time(made, network.p).items()
  }
  rounds = 2 if quick else 7
  seconds = time_in_turns(calls, rounds=rounds)
  renewal = time_in_turns({MASKS: masks_call(made, network.p)}, rounds=rounds)
  return {
    **{name: getattr(network, name) for name in ("title", "batch", "image_size", "train_images", "test_images")},
    "dtype": dtype,
    "measured_batch": batch,
    "measured_image_size": image_size,
    "groups": len(made.graph.groups),
    "seconds": {name: [s / per_call for s in values] for name, values in seconds.items()} | renewal,
  }


def steps_to_time(made: training_pieces.Pieces, p: float) -> dict[str, tuple[Step, Any, Any]]:
  """Returns name -> (step, its first state, `shared.variables`) of all that runs on the device."""
  model, graph, variables, preprocessing = made.model, made.graph, made.variables, made.preprocessing
  plain, proximal = training_pieces.weight_tx(), training_pieces.proximal_step(graph)
  penalty = regularize_by_penalty(graph, training_pieces.GAMMA)
  method = optax.chain(penalty, plain)
  generator, adamw = ArchitectureGenerator.for_graph(graph), optax.adamw(1e-3, weight_decay=1e-2)
  search = steps.generator_step(model, generator, graph, adamw, preprocessing, SearchOptions(macs_budget(graph, p)))
  evaluation = steps.evaluation_step(model, preprocessing)
  gradients = {"params": jax.tree.map(jnp.zeros_like, variables["params"])}
  return {
    WEIGHTS: (made.weight_step(plain), made.state(plain), None),
    METHOD: (made.weight_step(method), made.state(method), None),
    GENERATOR: (search, GeneratorState.create(generator.init(jax.random.key(0)), adamw), variables),
    EVALUATION: (
      lambda sums, shared, rows: evaluation(sums, shared, (rows, jnp.ones(rows.shape))),
      {name: jnp.zeros(()) for name in ("correct", "loss", "count")},
      variables,
    ),
    OPTIMIZER: (update_step(plain), made.state(plain), gradients),
    PENALTY: (update_step(penalty), made.state(penalty), gradients),
    PROXIMAL: (update_step(proximal), made.state(proximal), gradients),
  }


def update_step(tx: optax.GradientTransformationExtraArgs) -> Step:
  """Does what an optax transform does in a weight step, alone; the gradients are `shared.variables`."""

  def step(state: TrainState, shared: Shared, rows: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    del rows
    updates, opt_state = tx.update(shared.variables["params"], state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, params=params, opt_state=opt_state), {}

  return step


def masks_call(made: training_pieces.Pieces, p: float) -> Callable[[], Any]:
  """Returns a call that renews the masks: the generator's outputs, and their projection onto the budget on the host."""
  generator = ArchitectureGenerator.for_graph(made.graph)
  variables = replicate(generator.init(jax.random.key(0)), made.mesh)
  outputs = jax.jit(generator.apply)

  def call() -> Any:
    scores = split_by_group(jax.device_get(outputs(variables)), made.graph)
    masks = project_to_budget(made.graph, scores, macs_budget(made.graph, p))
    return jax.block_until_ready(replicate(masks, made.mesh))

  return call


# What an epoch costs.


def shares(report: Mapping[str, Any]) -> dict[str, float]:
  """Returns what each part of the method adds to an epoch's weight steps, as a share of them."""
  median = {name: statistics.median(values) for name, values in report["seconds"].items()}
  size = report["batch"] * report["image_size"] ** 2
  scale = size / (report["measured_batch"] * report["measured_image_size"] ** 2)
  # The optimizer takes as long for few images as for many.
  weights = (median[WEIGHTS] - median[OPTIMIZER]) * scale + median[OPTIMIZER]
  steps_per_epoch = report["train_images"] / report["batch"]
  evaluated = report["test_images"] / report["train_images"]
  return {
    GENERATOR: GENERATOR_SHARE * median[GENERATOR] * scale / weights,
    PENALTY: median[PENALTY] / weights,
    MASKS: median[MASKS] / (weights * steps_per_epoch),
    EVALUATION: evaluated * median[EVALUATION] * scale / weights / EVALUATED_EVERY,
  }


SEARCHED = {"with its generator": 1.0, "with a search that ends halfway": 0.5, "without generator": 0.0}
"""Who chooses the channels -> share of the epochs in which the generator learns."""


def epoch_cost(found: Mapping[str, float], searched: float) -> float:
  """Returns what `shares` add up to in a mean epoch, where the generator learns in a share of the epochs."""
  return sum(found.values()) - (1 - searched) * found[GENERATOR]


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  networks, lines = report["networks"], []
  for network in networks.values():
    found, title = shares(network), network["title"]
    penalty = found[PENALTY]
    for how, searched in SEARCHED.items():
      epoch = epoch_cost(found, searched)
      costs = f"{title}: an epoch with the method, {how}, costs {epoch:.1%} more"
      lines.append(goal(epoch <= GOAL_EPOCH, f"{costs}, asked for at most {GOAL_EPOCH:.0%}."))
    costs = f"{title}: the penalty's gradient is {penalty:.2%} of a weight step"
    lines.append(goal(penalty < GOAL_PENALTY, f"{costs}, asked for less than {GOAL_PENALTY:.0%}."))
  return [time_table(networks), cost_table(networks), "\n".join(lines)]


def time_table(networks: Mapping[str, Any]) -> str:
  """Returns milliseconds of everything that was timed."""
  lines = []
  for report in networks.values():
    size = f"{report['measured_batch']} images of {report['measured_image_size']} pixels"
    cells = [shown(1e3 * statistics.median(report["seconds"][name])) for name in TIMED]
    generator = median_ratio(report["seconds"][GENERATOR], report["seconds"][WEIGHTS])
    lines.append([f"{report['title']}, {size}, {report['dtype']}", *cells, f"{generator:.2f}"])
  return table(["time of", *(f"{name}, ms" for name in TIMED), "generator step / weight step"], lines)


def cost_table(networks: Mapping[str, Any]) -> str:
  """Returns what each part adds to an epoch."""
  lines = []
  for report in networks.values():
    found = shares(report)
    cells = [*(found[name] for name in ADDED), *(epoch_cost(found, searched) for searched in SEARCHED.values())]
    lines.append([f"{report['title']}, {report['groups']} groups", *(f"{cell:.2%}" for cell in cells)])
  return table(["added to an epoch by", "generator steps", *ADDED[1:], *(f"sum {how}" for how in SEARCHED)], lines)


if __name__ == "__main__":
  main()
