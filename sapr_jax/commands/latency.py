"""`sapr latency`: how long the layers of a network take on this device, as a table for budgets in latency."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from sapr_jax.commands import networks
from sapr_jax.commands.answer import Answer, table
from sapr_jax.errors import InputError

SUMMARY = "measure a network's layers on this device, for a budget in latency"
EXAMPLES = """\
examples:
  sapr latency runs/digits/dense pi.json --batch-size 1
  sapr latency resnet56 server.json --batch-size 32
  sapr prune runs/digits/dense small --cost latency --latency-table pi.json --keep 0.5

The table can be made on the device that is to serve the network, and used on another one.
It takes some minutes. Other programs should rest meanwhile.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("target", metavar="MODEL|NETWORK", help="saved dense model, or name of a network")
  parser.add_argument("out", metavar="FILE", help="the table, in JSON")
  parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="inputs in a call (default: 1)")
  parser.add_argument("--select", default="blocks", metavar="GROUPS", help="blocks (default), unjoined or exact")
  networks.add_patterns(parser)
  parser.add_argument("--classes", type=int, metavar="N", help="outputs of a network by name")
  networks.add_shape(parser, "for a network of other images than usual")


def run(args: argparse.Namespace) -> Answer:
  from sapr_jax import channels, models, training
  from sapr_jax.runtime.devices import start_jax

  folder = pathlib.Path(args.out).parent
  if not os.access(folder, os.W_OK | os.X_OK) or os.path.isdir(args.out):  # told before minutes have passed
    raise InputError(f"FILE must be a file in a folder that can be written, got {args.out}.")
  start_jax()
  if args.select not in channels.SELECTIONS:
    raise InputError(f"--select must be one of {', '.join(channels.SELECTIONS)}, got {args.select!r}.")
  model: Any
  if os.path.isdir(args.target):
    if args.classes is not None:
      raise InputError("--classes must be left out for a saved model, which has its own.")
    saved = networks.open_saved(args.target, args.input_shape)
    model, variables, shape, dtype = saved.model, saved.variables, saved.inputs.shape, saved.inputs.dtype
  else:
    if args.target not in models.MODELS:
      raise InputError(f"{args.target!r} is no saved model or network; networks are {', '.join(models.MODELS)}.")
    model = models.create(args.target, **({} if args.classes is None else {"num_classes": args.classes}))
    shape, dtype = args.input_shape or networks.usual_shape(model), "float32"
    variables = networks.abstract_variables(model, shape)
  graph = channels.trace_channels(model, variables, (1, *shape), input_dtype=dtype, **networks.chosen_groups(args))
  found = training.measure_latency(model, variables, graph, batch_size=args.batch_size)
  training.write_latency_table(args.out, found)
  widths = sum(layer.milliseconds.size for layer in found.layers)
  rows = [["network", "channels", "ms", "predicted from the others", "error"]]
  for number, known in enumerate(found.networks):
    cells = [f"{sum(known['widths'])}", f"{known['milliseconds']:.3f}", f"{known['predicted']:.3f}"]
    name = ("dense", "one channel a group")[number] if number < 2 else f"random widths {number - 1}"
    rows.append([name, *cells, f"{known['predicted'] / known['milliseconds'] - 1:+.1%}"])
  facts = {**found.about, "layers": len(found.layers), "widths": widths, "networks": list(found.networks)}
  text = (
    f"{found.about['device']}, batches of {args.batch_size} inputs of {networks.written(shape)}:"
    f" {len(found.layers)} layers, {widths} widths\n\n{table(rows, [1, 2, 3, 4])}\n\n{args.out} is written."
  )
  return Answer({"out": args.out, **facts}, text)
