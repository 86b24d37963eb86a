"""What pruning gives: latency and throughput of dense and pruned networks, beside their MACs, and PyTorch's.

    python -m benchmarks.pruned_speed

Compiled, in evaluation mode. The pruned networks have the paper's share of the MACs, with widths that are multiples
of 1, 8 and 16. Some five minutes on two CPU cores. `--networks` measures some networks only and keeps what was
recorded of the others on the same machine. Needs torch and torch-pruning.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import median_ratio, record_some, shown, table, time_in_turns
from benchmarks.performance_page import provenance
from benchmarks.training_pieces import random_masks, random_variables
from sapr_jax import InputError, models, prune, trace_channels
from sapr_jax.channels import count_macs
from sapr_jax.training import cpu
from sapr_jax.training.rounding import default_round_to

ROUND_TO = (1, 8, 16)
GOAL = 0.8
DENSE, FLOOR, TORCH_DENSE, TORCH_PRUNED = "dense", "one channel a group", "PyTorch, dense", "Torch-Pruning"


@dataclasses.dataclass(frozen=True)
class Network:
  """A network of the paper, with the share p of its prunable MACs that the paper keeps."""

  name: str
  title: str
  image_size: int
  classes: int
  p: float
  cpu_batches: tuple[int, ...]
  accelerator_batches: tuple[int, ...] = (1, 32, 256)
  torch_pruning: bool = False

  @property
  def input_shape(self) -> tuple[int, int, int, int]:
    return (1, self.image_size, self.image_size, 3)

  def shrunk(self) -> Network:
    """Returns what `--quick` measures."""
    size = min(self.image_size, 128)
    return dataclasses.replace(self, image_size=size, cpu_batches=(1, 4), accelerator_batches=(1, 4))


NETWORKS = (
  Network("resnet50", "ResNet-50", 224, 1000, 0.37, (1, 8, 32), torch_pruning=True),
  Network("resnet56", "ResNet-56 (CIFAR)", 32, 10, 0.48, (1, 8, 32, 128)),
  Network("mobilenetv2", "MobileNet-V2", 224, 1000, 0.65, (1, 8, 32)),
)


def main() -> None:
  cpu.keep_memory()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same GPU
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  names = [network.name for network in NETWORKS]
  parser.add_argument("--networks", nargs="+", choices=names, default=names)
  parser.add_argument("--quick", action="store_true", help="small images and batches, few rounds; records nothing")
  args = parser.parse_args()
  try:
    from benchmarks import torch_inference
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is missing; pip install -e '.[bench]'")
  platform, rounds, measured = jax.devices()[0].platform, 2 if args.quick else 5, {}
  for network in NETWORKS:
    if network.name in args.networks:
      chosen = network.shrunk() if args.quick else network
      measured[network.name] = measure(chosen, platform, rounds, torch_inference)
      if not args.quick:
        record_some("pruned_speed", "networks", measured, names)
  print("\n\n".join(map(_network_tables, measured.values())))


# Measuring.


def measure(network: Network, platform: str, rounds: int, peer: Any) -> dict[str, Any]:
  """Measures one network in all its forms; `peer` is `benchmarks.torch_inference`."""
  result: dict[str, Any] = {"title": network.title, "p": network.p, "times": {}}
  peers: dict[str, Any] = {}
  for dtype in ("float32",) if platform == "cpu" else ("float32", "bfloat16"):
    forms, result["narrowest_group"] = our_forms(network, dtype)
    if not peers:
      result["macs"] = {name: count_macs(m, v, network.input_shape) for name, (m, v) in forms.items()}
      peers = torch_forms(network, result["macs"][pruned(1)], peer)
      result["macs"] |= {
        name: peer.count_macs(model, (3, network.image_size, network.image_size)) for name, model in peers.items()
      }
    result["times"][dtype] = {}
    for batch in network.cpu_batches if platform == "cpu" else network.accelerator_batches:
      peer.forget_compiled()
      calls = {name: forward(m, v, batch, network) for name, (m, v) in forms.items()}
      how = {}
      for name, model in peers.items():
        calls[name], how[name] = peer.inference(model, batch, network.image_size, dtype=dtype)
      result["times"][dtype][str(batch)] = timed(calls, rounds) | {"torch": how}
      print(f"{network.title}, {dtype}, batch {batch}: measured", file=sys.stderr, flush=True)
  return result


def our_forms(network: Network, dtype: str) -> tuple[dict[str, Any], int]:
  """Returns name -> (model, variables) of the dense network and the pruned ones, and the size of the narrowest group.

  A form whose widths cannot meet the budget is left out. The last has one channel in each group: what is never pruned.
  """
  model = models.create(network.name, num_classes=network.classes, dtype=jnp.dtype(dtype))
  variables = random_variables(model, network.input_shape)
  graph = trace_channels(model, variables, network.input_shape)
  forms = {DENSE: (model, variables)}
  for round_to in ROUND_TO:
    with contextlib.suppress(InputError):
      masks = random_masks(graph, network.p, round_to=round_to)
      forms[pruned(round_to)] = prune(model, variables, graph, masks)
  least = {group.name: np.arange(group.size) == 0 for group in graph.groups}
  forms[FLOOR] = prune(model, variables, graph, {name: mask.astype(np.float32) for name, mask in least.items()})
  return forms, min(group.size for group in graph.groups)


def pruned(round_to: int) -> str:
  return f"pruned, round_to {round_to}"


def torch_forms(network: Network, macs: int, peer: Any) -> dict[str, Any]:
  """Returns name -> PyTorch's network: the dense one, and the one that Torch-Pruning cuts to these MACs."""
  forms = {TORCH_DENSE: peer.create(network.name)}
  if network.torch_pruning:
    forms[TORCH_PRUNED] = peer.prune_to_macs(forms[TORCH_DENSE], "fc", macs, network.image_size)
  return forms


def forward(model: Any, variables: Any, batch: int, network: Network) -> Callable[[], Any]:
  """Returns a call that computes the logits of a batch and waits for them."""
  variables = jax.device_put(variables)
  x = jax.random.normal(jax.random.key(0), (batch, *network.input_shape[1:]))

  def logits(variables: Any, x: jax.Array) -> jax.Array:
    return model.apply(variables, x, train=False)

  on_cpu = jax.devices()[0].platform == "cpu"
  compiled = jax.jit(cpu.with_fast_layers(logits) if on_cpu else logits).lower(variables, x).compile()
  return lambda: jax.block_until_ready(compiled(variables, x))


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
  """Returns milliseconds, speed-ups over the dense network of the same framework, PyTorch's dense time over ours."""
  trial = time_in_turns(calls, rounds=1, warm_up=2)
  slowest = max(seconds[0] for seconds in trial.values())
  repeats = max(1, round(0.05 / slowest))  # short calls are timed together, and more often
  seconds = time_in_turns(calls, rounds=rounds if slowest > 0.2 else 3 * rounds, warm_up=0, repeats=repeats)
  return {
    "milliseconds": {name: round(1e3 * statistics.median(each), 4) for name, each in seconds.items()},
    "speed_up": {name: round(median_ratio(seconds[dense_of(name)], each), 4) for name, each in seconds.items()},
    "pytorch_over_ours": round(median_ratio(seconds[TORCH_DENSE], seconds[DENSE]), 4),
  }


def dense_of(name: str) -> str:
  """Returns the dense form that a form is compared with."""
  return TORCH_DENSE if name in (TORCH_DENSE, TORCH_PRUNED) else DENSE


# The page.

_HEAD = f"""## What pruning gives

Time to the logits of a batch that lies on the device, in evaluation mode, of the compact network, compiled; on a CPU
with what `sapr_jax/training/cpu.py` does for depthwise convolutions and memory (the memory of PyTorch too). The
widths are not those of a trained run: random scores (normal, seed 0) were projected onto the paper's share p of the
prunable MACs, with `prune.round_to` {", ".join(map(str, ROUND_TO))} within the same budget. That gives uneven
widths as a trained generator does; which layers keep most depends on the run. *Promised* is the ratio of all MACs,
*speed-up* that of the times at the largest batch, each to the dense network of the same framework, *share* the
second over the first. PyTorch runs eagerly in the faster of its two memory formats on a CPU, and under
`torch.compile` with default settings, channels last, on a GPU. Torch-Pruning is its `MagnitudePruner` with group
norms and one ratio for all layers, which prunes residual streams too, at our MACs within 1 %. The network with one
channel in each group shows what pruning cannot take away: stem, head, residual streams, and what is done to them
between the convolutions."""

_VERDICT = f"""The goal is {GOAL} of the promised speed-up at the largest batch. *That stays* is measured with one
channel in each group; *possible* is the share if all else went exactly with the MACs. A miss near it is
bounded by the residual streams, whose normalizations and additions wait for memory and are not pruned;
one well below it, by convolutions that are less efficient when they are narrow. Unset, `prune.round_to`
is what `sapr_jax/training/rounding.py` has for the backend, or 1 where a group would then have fewer
than eight widths to choose from."""


def section(reports: Mapping[str, Any]) -> str:
  """Returns the section of docs/performance.md, from the report of each platform."""
  parts = [_HEAD]
  for platform, report in reports.items():
    networks = report["networks"].values()
    parts += [f"### On a {platform.upper()}", provenance(report), *map(_network_tables, networks)]
    parts += ["Share of the promised speed-up that is reached, by batch size:", _share_table(networks)]
    parts += [_VERDICT, _verdict_table(networks, platform), *_left_out(networks)]
  return "\n\n".join(parts)


def _network_tables(network: Mapping[str, Any]) -> str:
  parts = []
  for dtype in network["times"]:
    parts += [f"{network['title']}, {dtype}, p = {network['p']}:", _network_table(network, dtype)]
  return "\n\n".join(parts)


def _network_table(network: Mapping[str, Any], dtype: str) -> str:
  times, macs = network["times"][dtype], network["macs"]
  largest = max(times, key=int)
  rows = []
  for name in times[largest]["milliseconds"]:
    milliseconds = [times[batch]["milliseconds"][name] for batch in times]
    rate = shown(1e3 * int(largest) / milliseconds[-1])
    ratios = [promised(macs, name), times[largest]["speed_up"][name], share(network, dtype, largest, name)]
    rows.append([name, shown(macs[name] / 1e6, 4), *map(shown, milliseconds), rate, *map(shown, ratios)])
  header = ["network", "MACs, M", *(f"ms, batch {batch}" for batch in times), f"images/s, batch {largest}"]
  return table([*header, "promised", "speed-up", "share"], rows)


def promised(macs: Mapping[str, int], name: str) -> float:
  """Returns the speed-up if time went with MACs."""
  return macs[dense_of(name)] / macs[name]


def share(network: Mapping[str, Any], dtype: str, batch: str, name: str) -> float:
  """Returns measured over promised speed-up."""
  return network["times"][dtype][batch]["speed_up"][name] / promised(network["macs"], name)


def _share_table(networks: Any) -> str:
  every = sorted({int(batch) for network in networks for times in network["times"].values() for batch in times})
  rows = []
  for network in networks:
    for dtype, times in network["times"].items():
      for name in [name for name in network["macs"] if name not in (dense_of(name), FLOOR)]:
        cells = [shown(share(network, dtype, str(b), name), 2) if str(b) in times else "" for b in every]
        rows.append([f"{network['title']}, {dtype}, {name}", *cells])
  return table(["network", *(f"batch {b}" for b in every)], rows)


def _verdict_table(networks: Any, platform: str) -> str:
  """Says at the largest batch whether the default of the platform reaches the goal, and what bounds it."""
  rows = []
  for network in networks:
    chosen = pruned(default_round_to(platform, network["narrowest_group"]))
    for dtype, times in network["times"].items():
      batch = max(times, key=int)
      reached = share(network, dtype, batch, chosen)
      left = 1 / times[batch]["speed_up"][FLOOR]
      rows.append(
        [
          f"{network['title']}, {dtype}, batch {batch}, {chosen}",
          shown(reached, 2),
          "reached" if reached >= GOAL else "missed",
          f"{left:.0%}",
          f"{1 / promised(network['macs'], FLOOR):.0%}",
          shown(bound(network["macs"], left, chosen), 2),
          shown(times[batch]["pytorch_over_ours"]),
        ]
      )
  header = ["the default here", "share", f"goal: {GOAL}", "time that stays", "MACs that stay", "possible share"]
  return table([*header, "PyTorch's dense time over ours"], rows)


def bound(macs: Mapping[str, int], left: float, name: str) -> float:
  """Returns the share of the promised speed-up if a part `left` of the dense time stays and the rest goes with MACs."""
  kept = (macs[name] - macs[FLOOR]) / (macs[DENSE] - macs[FLOOR])
  return 1 / (left + (1 - left) * kept) / promised(macs, name)


def _left_out(networks: Any) -> list[str]:
  lines = []
  for network in networks:
    if missing := [str(r) for r in ROUND_TO if pruned(r) not in network["macs"]]:
      lines.append(
        f"{network['title']} cannot meet its budget with round_to {', '.join(missing)}: its narrowest groups have"
        f" {network['narrowest_group']} channels."
      )
  return lines


if __name__ == "__main__":
  main()
