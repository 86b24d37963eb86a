"""`sapr benchmark`: how much faster and smaller a pruned network is, on the device at hand."""

from __future__ import annotations

import argparse
from typing import Any

from sapr_jax.commands.answer import Answer, size_of, table
from sapr_jax.commands.networks import add_shape, open_saved, written
from sapr_jax.errors import InputError

SUMMARY = "measure latency and memory, pruned against dense, on this device"
EXAMPLES = """\
examples:
  sapr benchmark runs/digits/dense runs/digits/pruned
  sapr benchmark dense pruned --batch-size 1 32 256 --repeats 50 --json

The two take turns, so that other load on the machine affects them alike. Latency is the
median, with the middle half of all calls in brackets; compilation does not count. Memory is
what the compiled program holds at once: weights, images, outputs and all between. On a CPU,
depthwise convolutions have the form that `sapr export` writes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("dense", metavar="DENSE", help="saved model")
  parser.add_argument("pruned", metavar="PRUNED", help="saved model that takes the same inputs")
  parser.add_argument(
    "--batch-size", type=int, nargs="+", default=[1, 128], metavar="N", help="images in a call (default: 1 128)"
  )
  parser.add_argument("--repeats", type=int, default=25, metavar="N", help="calls of each (default: %(default)s)")
  add_shape(parser, "where they were saved without their inputs")


def run(args: argparse.Namespace) -> Answer:
  for name, values in (("--batch-size", args.batch_size), ("--repeats", [args.repeats])):
    if wrong := [value for value in values if not 0 < value < 2**31]:
      raise InputError(f"{name} must be at least 1, got {wrong[0]}.")
  import jax

  from sapr_jax import channels, report
  from sapr_jax.runtime.devices import start_jax

  start_jax()
  saved = {name: open_saved(getattr(args, name), args.input_shape) for name in ("dense", "pruned")}
  shapes = [network.inputs.input_shape for network in saved.values()]
  if shapes[0] != shapes[1]:
    raise InputError(
      f"DENSE and PRUNED must take the same inputs, got {written(shapes[0][1:])} and {written(shapes[1][1:])}."
    )
  facts: dict[str, Any] = {"device": jax.devices()[0].device_kind, "input_shape": list(shapes[0][1:])}
  for name, network in saved.items():
    facts[name] = {
      "macs": channels.count_macs(network.model, network.variables, shapes[0]),
      "params": network.info.params,
      "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(network.variables)),
    }
  pairs = {name: (network.model, network.variables) for name, network in saved.items()}
  facts["batches"] = {
    str(size): report.compare_programs(pairs, shapes[0], size, repeats=args.repeats) for size in args.batch_size
  }
  return Answer(facts, _text(facts, args.repeats))


def _text(facts: dict[str, Any], repeats: int) -> str:
  dense, pruned = facts["dense"], facts["pruned"]
  rows = [["", "dense", "pruned", "dense / pruned"]]
  for title, name, show in (
    ("MACs", "macs", lambda value: f"{value:,}"),
    ("parameters", "params", lambda value: f"{value:,}"),
    ("weights", "weight_bytes", size_of),
  ):
    rows.append([title, show(dense[name]), show(pruned[name]), _ratio(dense[name], pruned[name])])
  for size, found in facts["batches"].items():
    of = [found["dense"], found["pruned"]]
    times = [f"{x['latency_ms']:.3f} ms ({x['quartiles_ms'][0]:.3f}-{x['quartiles_ms'][1]:.3f})" for x in of]
    rows.append([f"batch {size}: latency", *times, _ratio(*(x["latency_ms"] for x in of))])
    if None not in (memory := [x["memory_bytes"] for x in of]):
      rows.append([f"batch {size}: memory", *map(size_of, memory), _ratio(*memory)])
  implied = _ratio(dense["macs"], pruned["macs"])
  return (
    f"{facts['device']}, inputs of {written(facts['input_shape'])}, {repeats} calls each\n{table(rows, [1, 2, 3])}\n"
    f"The MACs alone would make it {implied} as fast."
  )


def _ratio(dense: float, pruned: float) -> str:
  return f"{dense / pruned:.2f}x" if pruned else "-"
