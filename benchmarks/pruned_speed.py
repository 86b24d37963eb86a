"""Gains of pruning: latency and throughput of dense and pruned networks, beside their MACs, and PyTorch's.

    python -m benchmarks.pruned_speed [--quick] [NETWORK ...]

Compiled, in evaluation mode. The pruned networks have the paper's share of the MACs, with widths that are multiples
of 1, 8 and 16. Some five minutes on two CPU cores. Without PyTorch, or without Torch-Pruning, the others alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import (
  attempt,
  goal,
  measure_rows,
  median_ratio,
  note,
  shown,
  table,
  time_in_turns,
  torch_peer,
)
from benchmarks.training_pieces import forward, random_masks, random_variables
from sapr_jax import InputError, models, prune, trace_channels
from sapr_jax.channels import count_macs
from sapr_jax.errors import one_line
from sapr_jax.method.rounding import DEFAULT_ROUND_TO
from sapr_jax.runtime import keep_memory

ROUND_TO = (1, 8, 16)
GOAL = 0.8
DENSE, FLOOR, TORCH_DENSE, TORCH_PRUNED = "dense", "one channel a group", "PyTorch, dense", "Torch-Pruning"


@dataclasses.dataclass(frozen=True)
class Network:
  """A network of the paper, with the share p of its prunable MACs that the paper keeps.

  A CPU measures float32.
  """

  name: str
  title: str
  image_size: int
  classes: int
  p: float
  cpu_batches: tuple[int, ...]
  accelerator_batches: tuple[int, ...] = (1, 256)
  accelerator_dtypes: tuple[str, ...] = ("bfloat16",)
  torch_pruning: bool = False


NETWORKS = (
  Network("resnet50", "ResNet-50", 224, 1000, 0.37, (1, 8, 32), torch_pruning=True),
  Network("resnet56", "ResNet-56 (CIFAR)", 32, 10, 0.48, (1, 8, 32, 128), (1, 32, 1024), ("float32", "bfloat16")),
  Network("mobilenetv2", "MobileNet-V2", 224, 1000, 0.65, (1, 8, 32)),
)


def main() -> None:
  keep_memory()
  peer = torch_peer()

  def measure_network(network: Network, quick: bool) -> dict[str, Any]:
    if quick:
      small: Any = {"name": "resnet8", "image_size": 32, "classes": 10, "torch_pruning": False}
      network = dataclasses.replace(network, **small, cpu_batches=(4,), accelerator_batches=(4,))
    return measure(network, 2 if quick else 5, peer)

  networks = {network.name: network for network in NETWORKS}
  measured = measure_rows(__doc__, "pruned_speed", "networks", networks, measure_network)
  print("\n\n".join(_network_table(network, dtype) for network in measured.values() for dtype in network["times"]))


# Measuring.


def measure(network: Network, rounds: int, peer: Any) -> dict[str, Any]:
  """Measures one network in all its forms; `peer` is `benchmarks.torch_peer`, or None."""
  on_cpu, size = jax.devices()[0].platform == "cpu", network.image_size
  result: dict[str, Any] = {"title": network.title, "p": network.p, "times": {}}
  peers: dict[str, Any] = {}
  for dtype in ("float32",) if on_cpu else network.accelerator_dtypes:
    forms, result["narrowest_group"] = our_forms(network, dtype)
    if "macs" not in result:
      macs = {name: count_macs(m, v, (1, size, size, 3)) for name, (m, v) in forms.items()}
      peers = torch_forms(network, peer, macs[pruned(1)]) if peer else {}
      result["macs"] = macs | {name: peer.count_macs(model, (3, size, size)) for name, model in peers.items()}
    result["times"][dtype] = {}
    for batch in network.cpu_batches if on_cpu else network.accelerator_batches:
      calls = {name: forward(m, v, (batch, size, size, 3)) for name, (m, v) in forms.items()}
      for name, model in peers.items():
        calls |= attempt(name, functools.partial(peer.inference, model, batch, size, dtype=dtype))
      result["times"][dtype][str(batch)] = timed(calls, rounds)
      calls.clear()
      if peer:
        peer.release()
      print(f"{network.title}, {dtype}, batch {batch}: measured", file=sys.stderr, flush=True)
  return result


def torch_forms(network: Network, peer: Any, macs: int) -> dict[str, Any]:
  """Returns name -> PyTorch's network: the dense one, and Torch-Pruning's with so many MACs if it is asked for."""
  forms = {TORCH_DENSE: peer.create(network.name)}
  if network.torch_pruning:
    try:
      forms[TORCH_PRUNED] = peer.prune_to_macs(forms[TORCH_DENSE], "fc", macs, network.image_size)
    except Exception as error:  # it is missing, or does not suit this PyTorch
      note(f"without Torch-Pruning, which failed: {one_line(error, 200)}")
  return forms


def our_forms(network: Network, dtype: str) -> tuple[dict[str, Any], int]:
  """Returns name -> (model, variables) of the dense network and the pruned ones, and the size of the narrowest group.

  A form whose widths cannot meet the budget is left out. The last has one channel in each group: what is never pruned.
  """
  shape = (1, network.image_size, network.image_size, 3)
  model = models.create(network.name, num_classes=network.classes, dtype=jnp.dtype(dtype))
  variables = random_variables(model, shape)
  graph = trace_channels(model, variables, shape)
  forms = {DENSE: (model, variables)}
  for round_to in ROUND_TO:
    with contextlib.suppress(InputError):
      masks = random_masks(graph, network.p, round_to=round_to)
      forms[pruned(round_to)] = prune(model, variables, graph, masks)
  least = {group.name: np.eye(1, group.size, dtype=np.float32)[0] for group in graph.groups}
  forms[FLOOR] = prune(model, variables, graph, least)
  return forms, min(group.size for group in graph.groups)


def pruned(round_to: int) -> str:
  return f"pruned, round_to {round_to}"


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
  """Returns milliseconds, speed-ups over the dense network of the same framework, PyTorch's dense time over ours."""
  trial = time_in_turns(calls, rounds=1, warm_up=2)
  slowest = max(seconds[0] for seconds in trial.values())
  repeats = max(1, round(0.05 / slowest))  # short calls are timed together, and more often
  seconds = time_in_turns(calls, rounds=rounds if slowest > 0.2 else 3 * rounds, warm_up=0, repeats=repeats)
  result: dict[str, Any] = {
    "milliseconds": {name: round(1e3 * statistics.median(each), 4) for name, each in seconds.items()},
    "speed_up": {
      name: round(median_ratio(seconds[dense_of(name)], each), 4)
      for name, each in seconds.items()
      if dense_of(name) in seconds
    },
  }
  if TORCH_DENSE in seconds:
    result["pytorch_over_ours"] = round(median_ratio(seconds[TORCH_DENSE], seconds[DENSE]), 4)
  return result


def dense_of(name: str) -> str:
  """Returns the dense form that a form is compared with."""
  return TORCH_DENSE if name in (TORCH_DENSE, TORCH_PRUNED) else DENSE


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  networks, found = report["networks"].values(), []
  for network in networks:
    for dtype in network["times"]:
      found += [f"{network['title']}, {dtype}, p = {network['p']}:", _network_table(network, dtype)]
  found += ["Share of the promised speed-up that is reached, by batch size:", _share_table(networks)]
  found += ["At the largest batch:", _verdict_table(networks, platform), _goals(networks, platform)]
  for network in networks:
    if missing := [str(r) for r in ROUND_TO if pruned(r) not in network["macs"]]:
      found.append(
        f"{network['title']} cannot meet its budget with round_to {', '.join(missing)}: its narrowest groups have"
        f" {network['narrowest_group']} channels."
      )
  return found


def _network_table(network: Mapping[str, Any], dtype: str) -> str:
  times, macs = network["times"][dtype], network["macs"]
  largest = max(times, key=int)
  rows = []
  for name in times[largest]["speed_up"]:
    milliseconds = [times[batch]["milliseconds"].get(name) for batch in times]
    rate = shown(1e3 * int(largest) / milliseconds[-1])
    ratios = [promised(macs, name), times[largest]["speed_up"][name], share(network, dtype, largest, name)]
    cells = ["" if ms is None else shown(ms) for ms in milliseconds]
    rows.append([name, shown(macs[name] / 1e6, 4), *cells, rate, *map(shown, ratios)])
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
        timed = [name in times[str(b)]["speed_up"] if str(b) in times else False for b in every]
        cells = [shown(share(network, dtype, str(b), name), 2) if t else "" for b, t in zip(every, timed, strict=True)]
        rows.append([f"{network['title']}, {dtype}, {name}", *cells])
  return table(["network", *(f"batch {b}" for b in every)], rows)


def default_form(network: Mapping[str, Any], platform: str) -> str:
  """Returns the form that `method.rounding.default_round_to` asks for, told from what was recorded."""
  value = DEFAULT_ROUND_TO.get(platform, 1)
  return pruned(value if network["narrowest_group"] >= 8 * value and pruned(value) in network["macs"] else 1)


def _verdict_table(networks: Any, platform: str) -> str:
  """Says of the default of the platform, at the largest batch, what bounds it."""
  rows = []
  for network in networks:
    macs, chosen = network["macs"], default_form(network, platform)
    for dtype, times in network["times"].items():
      batch = max(times, key=int)
      reached, left = share(network, dtype, batch, chosen), 1 / times[batch]["speed_up"][FLOOR]
      # A part `left` of the dense time stays, and the rest goes with MACs.
      kept = (macs[chosen] - macs[FLOOR]) / (macs[DENSE] - macs[FLOOR])
      possible = 1 / (left + (1 - left) * kept) / promised(macs, chosen)
      cells = [shown(reached, 2), f"{left:.0%}", f"{1 / promised(macs, FLOOR):.0%}", shown(possible, 2)]
      over = times[batch].get("pytorch_over_ours")
      cells.append("" if over is None else shown(over))
      rows.append([f"{network['title']}, {dtype}, batch {batch}, {chosen}", *cells])
  header = ["the default here", "share", "time that stays", "MACs that stay", "possible share"]
  return table([*header, "PyTorch's dense time over ours"], rows)


def _goals(networks: Any, platform: str) -> str:
  lines = []
  for network in networks:
    for dtype, times in network["times"].items():
      batch = max(times, key=int)
      reached = share(network, dtype, batch, chosen := default_form(network, platform))
      lines.append(
        goal(
          reached >= GOAL,
          f"{network['title']}, {dtype}, batch {batch}, {chosen}: {shown(reached, 2)} of the speed-up that its MACs"
          f" promise, asked for at least {GOAL:g}.",
        )
      )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
