"""What the method costs: an epoch with generator and regularization beside the same epoch without.

    python -m benchmarks.method_cost [--networks NETWORK ...]

Times the steps of a run on random images that lie on the device, and adds up an epoch of the data set from them. A CPU
gets few images, and small ones of ImageNet: times that grow with the images are multiplied up to the size of the
experiment, the others are not. `--networks` measures some networks only and keeps what was recorded of the others on
the same machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sapr_jax.training.devices import Step, replicate

from benchmarks import training_pieces
from benchmarks.mapped_call import mapped_call
from benchmarks.measuring import median_ratio, positive, record_some, shown, table, time_in_turns
from benchmarks.performance_page import provenance
from sapr_jax.method import (
  ArchitectureGenerator,
  macs_budget,
  project_to_budget,
  regularize_by_penalty,
  regularize_by_prox,
  split_by_group,
)
from sapr_jax.training import keep_memory, state, steps

WEIGHTS, METHOD, GENERATOR, EVALUATION = "weight step", "with regularization", "generator step", "evaluation"
OPTIMIZER, PENALTY, PROXIMAL, MASKS = "optimizer", "penalty", "proximal step", "masks"

GENERATOR_SHARE = 0.1
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

  def measured(self, platform: str, quick: bool) -> tuple[int, int]:
    """Returns the batch and the image size to measure with."""
    if quick:
      return 4, 32
    return self.cpu if platform == "cpu" else (self.batch, self.image_size)


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
  platform = jax.devices()[0].platform
  networks = {network.name: network for network in NETWORKS}
  default = [name for name in networks if platform != "cpu" or name not in _LONG_ON_CPU]
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", nargs="+", choices=networks, default=default)
  parser.add_argument("--rounds", type=positive, default=7, help="timings of each")
  parser.add_argument("--quick", action="store_true", help="small batches and images, few rounds; records nothing")
  args = parser.parse_args()
  measured = {}
  for name in args.networks:
    batch, image_size = networks[name].measured(platform, args.quick)
    measured[name] = measure(networks[name], batch, image_size, 2 if args.quick else args.rounds)
    print(f"{networks[name].title}: measured", file=sys.stderr, flush=True)
    if not args.quick:
      record_some("method_cost", "networks", measured, networks)
  print(f"{time_table(measured)}\n\n{cost_table(measured)}")


# Measuring.


def measure(network: Network, batch: int, image_size: int, rounds: int) -> dict[str, Any]:
  """Times everything that an epoch with the method is made of."""
  accelerated = jax.devices()[0].platform != "cpu"
  dtype = "bfloat16" if accelerated and network.image_size == 224 else "float32"
  per_call = (10 if network.image_size == 224 else 50) if accelerated else 1
  made = training_pieces.pieces(network.name, dtype=dtype, image_size=image_size, images=max(batch, 256))
  calls = {
    name: mapped_call(made_for, step, carry, batch, steps_per_call=per_call)
    for name, (made_for, step, carry) in step_pieces(made, network.p).items()
  }
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


def step_pieces(made: training_pieces.Pieces, p: float) -> dict[str, tuple[training_pieces.Pieces, Step, Any]]:
  """Returns name -> (pieces, step, its first carry) of all that runs on the device."""
  graph, params = made.graph, made.variables["params"]
  plain = training_pieces.weight_tx(None)
  penalty = regularize_by_penalty(graph, training_pieces.GAMMA)
  method = optax.chain(penalty, plain)
  proximal = regularize_by_prox(
    graph, training_pieces.LEARNING_RATE, training_pieces.GAMMA, momentum=training_pieces.MOMENTUM
  )
  generator, generator_tx = ArchitectureGenerator.for_graph(graph), optax.adamw(1e-3, weight_decay=1e-2)
  generator_step = steps.generator_step(
    made.model,
    generator,
    graph,
    generator_tx,
    made.preprocessing,
    p=p,
    macs_weight=4.0,
    bias=3.0,
    temperature=0.4,
    batch_statistics=False,
  )
  fixed = with_variables(made, made.variables)
  still = with_variables(made, {"params": jax.tree.map(jnp.zeros_like, params)})
  return {
    WEIGHTS: (
      made,
      steps.weight_step(made.model, plain, made.preprocessing),
      state.network_state(made.variables, plain),
    ),
    METHOD: (
      made,
      steps.weight_step(made.model, method, made.preprocessing),
      state.network_state(made.variables, method),
    ),
    GENERATOR: (fixed, generator_step, state.generator_state(generator, generator_tx, jax.random.key(0))),
    EVALUATION: (fixed, evaluation_step(made), {name: jnp.zeros(()) for name in ("correct", "loss", "count")}),
    OPTIMIZER: (still, update_step(plain), (params, plain.init(params))),
    PENALTY: (still, update_step(penalty), (params, penalty.init(params))),
    PROXIMAL: (still, update_step(proximal), (params, proximal.init(params))),
  }


def with_variables(made: training_pieces.Pieces, variables: Any) -> training_pieces.Pieces:
  shared = dataclasses.replace(made.shared, variables=replicate(variables, made.mesh))
  return dataclasses.replace(made, shared=shared)


def evaluation_step(made: training_pieces.Pieces) -> Step:
  """The evaluation of a batch, each image of weight one."""
  step = steps.evaluation_step(made.model, made.preprocessing)
  return lambda carry, shared, rows: step(carry, shared, (rows, jnp.ones(rows.shape)))


def update_step(tx: optax.GradientTransformationExtraArgs) -> Step:
  """What an optax transform does in a weight step, alone; the gradients are `shared.variables`."""

  def step(carry: Any, shared: steps.Shared, rows: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    del rows
    params, opt_state = carry
    updates, opt_state = tx.update(shared.variables["params"], opt_state, params, masks=shared.masks)
    return (optax.apply_updates(params, updates), opt_state), {}

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
    EVALUATION: evaluated * median[EVALUATION] * scale / weights,
  }


# What the page shows.


def section(reports: Mapping[str, Any]) -> str:
  """Returns the section of `docs/performance.md`."""
  parts = [
    "## What the method costs",
    "Steps of a run on random images that lie on the device, timed in turns; the optimizer's update and both forms of"
    " the regularization are timed alone as well, as a difference of two long times cannot show a percent. From them,"
    " what an epoch with the method costs more than the weight steps of one without: generator steps on"
    f" {GENERATOR_SHARE:.0%} of the images, the penalty's gradient in each weight step, new masks once, and one more"
    " evaluation on all test images, that of the sub-network.",
  ]
  for platform, report in reports.items():
    networks = report["networks"]
    parts += [f"### {platform.upper()}", time_table(networks), cost_table(networks)]
    if any(network["measured_image_size"] != network["image_size"] for network in networks.values()):
      parts.append(
        "Times that grow with the images are multiplied up to the batch and the image size of the experiment (CIFAR-10:"
        " 128 of 32 pixels, ImageNet: 256 of 224); those of optimizer, regularization and masks do not grow."
      )
    parts += [provenance(report), "\n".join(line for network in networks.values() for line in verdicts(network))]
  return "\n\n".join([*parts, _BOUNDS])


_BOUNDS = """What bounds it: a generator step is a forward pass and the backward pass through the activations, two
thirds of the arithmetic of a weight step; masks gate feature maps (`sapr_jax.masked_apply`), so that no kernel's
gradient is computed. With masked kernels, as it was before, it took 0.74 of a weight step for ResNet-20, 0.73 for
ResNet-56, 0.95 for ResNet-50, and 1.40 and 1.20 for the two forms of MobileNet-V2. For 10 % of the images that alone is
more than 5 % of an epoch, unless a backward pass were free. The evaluation of the sub-network in every epoch is for the
records; the method does not need it. On CIFAR-10 the test set is a fifth of the training set. Epochs without new masks
have no generator steps either."""


def time_table(networks: Mapping[str, Any]) -> str:
  """Returns milliseconds of everything that was timed."""
  names = (WEIGHTS, METHOD, GENERATOR, EVALUATION, OPTIMIZER, PENALTY, PROXIMAL, MASKS)
  lines = []
  for report in networks.values():
    size = f"{report['measured_batch']} images of {report['measured_image_size']} pixels"
    cells = [shown(1e3 * statistics.median(report["seconds"][name])) for name in names]
    generator = median_ratio(report["seconds"][GENERATOR], report["seconds"][WEIGHTS])
    lines.append([f"{report['title']}, {size}, {report['dtype']}", *cells, f"{generator:.2f}"])
  return table(["time of", *(f"{name}, ms" for name in names), "generator step / weight step"], lines)


def cost_table(networks: Mapping[str, Any]) -> str:
  """Returns what each part adds to an epoch."""
  names = (GENERATOR, PENALTY, MASKS, EVALUATION)
  lines = []
  for report in networks.values():
    found = shares(report)
    cells = [f"{found[name]:.2%}" for name in names]
    lines.append([f"{report['title']}, {report['groups']} groups", *cells, f"{sum(found.values()):.2%}"])
  return table(["added to an epoch by", "generator steps", *names[1:], "sum"], lines)


def verdicts(report: Mapping[str, Any]) -> list[str]:
  found, title = shares(report), report["title"]
  epoch, penalty = sum(found.values()), found[PENALTY]
  return [
    f"- Goal {_word(epoch <= GOAL_EPOCH)}: {title}: an epoch with the method costs {epoch:.1%} more, asked for at most"
    f" {GOAL_EPOCH:.0%}.",
    f"- Goal {_word(penalty < GOAL_PENALTY)}: {title}: the penalty's gradient is {penalty:.2%} of a weight step, asked"
    f" for less than {GOAL_PENALTY:.0%}.",
  ]


def _word(reached: bool) -> str:
  return "reached" if reached else "missed"


if __name__ == "__main__":
  main()
