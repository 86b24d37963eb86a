"""`sapr inspect`: what a network is, and which of its channels can be cut."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import textwrap
from typing import TYPE_CHECKING, Any

from sapr_jax.commands import networks
from sapr_jax.commands.answer import Answer, accuracy_of, table
from sapr_jax.errors import InputError, one_line

if TYPE_CHECKING:
  from sapr_jax.channels import ChannelGraph, ChannelGroup

SUMMARY = "show a network: channel groups, their cost, what cannot be cut"
EXAMPLES = """\
examples:
  sapr inspect resnet56                  # a network of this package
  sapr inspect resnet50 --select exact   # with the channels that residual streams share
  sapr inspect resnet56_cifar10          # an experiment, by its name or its file
  sapr inspect runs/digits/pruned        # a saved model: also widths, inputs, metrics

A group is a set of channels that can only be cut together. Its share of the MACs is that of
all layers that read or write it, so that shares may add up to more than 100 %.
"""
_WIDTH = 100
_SHAPES = {"digits": ((8, 8, 1), 10), "cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100)}
"""Data set -> shape and number of classes, so that a configuration can be shown without its images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("target", metavar="MODEL|CONFIG|NETWORK", help="saved model, experiment, or name of a network")
  parser.add_argument(
    "--select", choices=("blocks", "unjoined", "exact"), help="which groups; unset: those of the run, or blocks"
  )
  networks.add_patterns(parser)
  parser.add_argument("--classes", type=int, metavar="N", help="outputs of a network by name")
  networks.add_shape(parser, "for a network of other images than usual")


def run(args: argparse.Namespace) -> Answer:
  target = args.target
  if os.path.isdir(target):
    return _saved(args)
  from sapr_jax import configs, models

  if target in models.MODELS:
    given = {} if args.classes is None else {"num_classes": args.classes}
    return _fresh(args, models.create(target, **given), None, {}, networks.chosen_groups(args))
  if configs.file_of(target) is not None or target.endswith(".py"):
    return _config(args, _read_config(target))
  raise InputError(
    f"{target!r} is no saved model, experiment or network; experiments are {', '.join(configs.names())}, networks are"
    f" {', '.join(models.MODELS)}."
  )


def _read_config(target: str) -> Any:
  from ml_collections import ConfigDict

  from sapr_jax import configs

  if (file := configs.file_of(target)) is None:
    file = pathlib.Path(target)
    if not file.is_file():
      raise InputError(f"{target} must be a file, or the name of an experiment: {', '.join(configs.names())}.")
  spec = importlib.util.spec_from_file_location("inspected_config", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except Exception as error:  # the user's code
    raise InputError(f"{file} raised {type(error).__name__}: {one_line(error, 200)}; fix that file.") from error
  if not isinstance(config, ConfigDict):
    raise InputError(f"get_config() of {file} must return a ConfigDict, got a {type(config).__name__}.")
  return config


def _config(args: argparse.Namespace, config: Any) -> Answer:
  from sapr_jax import models
  from sapr_jax.method import amount_in_words
  from sapr_jax.report import cost_in_words
  from sapr_jax.training.config import check_config

  check_config(config)
  name = config.data.source if config.data.source == "digits" else config.data.name
  shape, classes = _SHAPES.get(name, (None, None))
  fields = {"width_multiplier": config.model.width_multiplier}
  if (classes := args.classes or classes) is not None:
    fields["num_classes"] = classes
  model = models.create(config.model.name, **fields)
  if config.data.stream:
    size = config.data.image_size or 224
    shape = (size, size, 3)
  prune = config.prune
  facts = {
    "model": config.model.name,
    "data": name,
    "epochs": {"train": config.train.epochs, "finetune": config.finetune.epochs},
    "proposer": prune.proposer,
    "cost": prune.cost,
    "keep": prune.p if prune.limit is None else None,
    "limit": prune.limit,
  }
  budget = f"{prune.p:.0%} of" if prune.limit is None else f"at most {amount_in_words(prune.limit)}:"
  head = (
    f"{config.model.name} on {name}: {config.train.epochs} epochs, then {config.finetune.epochs} of fine-tuning\n"
    f"{prune.proposer} chooses; {budget} {cost_in_words(prune.cost)} stay"
  )
  return _fresh(args, model, shape, facts, networks.chosen_groups(args, prune), head)


def _fresh(
  args: argparse.Namespace, model: Any, shape: Any, facts: dict[str, Any], chosen: Any, head: str | None = None
) -> Answer:
  """Answers for a network without weights."""
  from sapr_jax.artifacts import count_params

  shape = args.input_shape or shape or networks.usual_shape(model)
  variables = networks.abstract_variables(model, shape)
  graph = _graph(model, variables, shape, chosen, "float32")
  facts = {"target": args.target, "class": type(model).__name__, "input_shape": list(shape), **facts}
  facts |= {"params": count_params(variables), **_facts(graph, {})}
  what = f"{type(model).__name__}, inputs of {networks.written(shape)}"
  lines = [f"{head}\n{what}" if head else f"{args.target}: {what}", _counts(graph, facts["params"]), ""]
  return Answer(facts, "\n".join([*lines, *_text(graph, {})]))


def _saved(args: argparse.Namespace) -> Answer:
  from sapr_jax.channels import NarrowModule

  if args.classes is not None:
    raise InputError("--classes must be left out for a saved model, which has its own.")
  saved = networks.open_saved(args.target, args.input_shape)
  info, inputs, metrics = saved.info, saved.inputs, saved.info.metrics
  of_run = {name.removeprefix("prune."): value for name, value in info.config.items()}
  graph = _graph(saved.model, saved.variables, inputs.shape, networks.chosen_groups(args, of_run), inputs.dtype)
  dense: Any = metrics.get("dense")
  dense = dense if isinstance(dense, dict) else {}
  known = {key: value for key in ("macs", "params") if isinstance(value := dense.get(key), int)}
  facts = {
    "target": args.target,
    "class": info.module,
    "pruned": isinstance(saved.model, NarrowModule),
    "input_shape": list(inputs.shape),
    "params": info.params,
    **_facts(graph, info.widths),
    "widths": {layer: {"dense": full, "kept": kept} for layer, (full, kept) in info.widths.items()},
    "inputs": inputs.to_json(),
    "metrics": metrics,
  }
  pruned = ", pruned" if facts["pruned"] else ""
  lines = [
    f"{args.target}: {info.module}{pruned}, inputs of {networks.written(inputs.shape)} ({inputs.dtype})",
    _counts(graph, info.params, known),
  ]
  if accuracy := accuracy_of(metrics):
    before = accuracy_of({"accuracy": dense.get("accuracy")})
    lines.append(f"{accuracy} right when it was saved{f'; the dense network {before}' if before else ''}")
  if inputs.mean is not None and inputs.std is not None:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (inputs.mean, inputs.std))
    lines.append(f"normalized: mean {mean}, deviation {std}, of pixels in [0, 1]")
  if inputs.resize is not None:
    lines.append(f"resized: the shorter side to {inputs.resize} pixels, then the centre")
  if inputs.class_names is not None:
    names = textwrap.shorten(", ".join(inputs.class_names), 70, placeholder=" ...")
    lines.append(f"{len(inputs.class_names)} classes: {names}")
  return Answer(facts, "\n".join([*lines, "", *_text(graph, info.widths)]))


def _graph(model: Any, variables: Any, shape: tuple[int, ...], chosen: Any, dtype: str) -> ChannelGraph:
  from sapr_jax.channels import evaluation_kwargs, trace_channels

  kwargs = evaluation_kwargs(model)
  return trace_channels(model, variables, (1, *shape), apply_kwargs=kwargs, input_dtype=dtype, **chosen)


def _counts(graph: ChannelGraph, params: int, dense: Any = ()) -> str:
  def of(name: str, value: int) -> str:
    return f"{value:,} (of {dense[name]:,}, {value / dense[name]:.1%})" if name in dense else f"{value:,}"

  prunable = f"{graph.prunable_macs() / graph.macs():.1%} of them in layers that can be cut"
  return f"{of('macs', graph.macs())} MACs for an input, {prunable}\n{of('params', params)} parameters"


def _facts(graph: ChannelGraph, widths: Any) -> dict[str, Any]:
  from sapr_jax.channels.describe import macs_shares

  groups = []
  for group, share in zip(graph.groups, macs_shares(graph), strict=True):
    writers, readers = _layers(group)
    entry: dict[str, Any] = {"name": group.name, "channels": group.size, "macs_share": round(share, 6)}
    if group.name in widths:
      entry["dense_channels"] = widths[group.name][0]
    groups.append(entry | {"written_by": writers, "read_by": readers})
  fixed = [{"kernel": "/".join(key), "axis": axis, "reason": reason} for key, axis, reason in graph.fixed]
  return {"macs": graph.macs(), "prunable_macs": graph.prunable_macs(), "groups": groups, "fixed": fixed}


def _layers(group: ChannelGroup) -> tuple[list[str], list[str]]:
  """Returns the layers that write and that read the channels of a group, each once."""
  found: dict[str, dict[str, None]] = {"out": {}, "in": {}, "vector": {}}
  for member in group.members:
    found[member.role]["/".join(member.path[:-1])] = None
  return list(found["out"]), list(found["in"])


def _text(graph: ChannelGraph, widths: Any) -> list[str]:
  from sapr_jax.channels.describe import end_of, macs_shares

  rows = [["group", "channels", "of MACs", "layers"]]
  for group, share in zip(graph.groups, macs_shares(graph), strict=True):
    dense = widths.get(group.name, (None, None))[0]
    channels = f"{group.size} of {dense}" if dense is not None else str(group.size)
    rows.append([end_of(group.name, 40), channels, f"{share:.1%}", ""])
  left = sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:3])
  for row, group in zip(rows[1:], graph.groups, strict=True):
    scope = "".join(f"{name}/" for name in group.scope)
    writers, readers = ([name.removeprefix(scope) for name in names] for names in _layers(group))
    row[3] = _in_short(writers, readers, _WIDTH - left)
  lines = [f"{len(graph.groups)} channel groups", table(rows, [1, 2])]
  if graph.fixed:
    lines += ["", "channels that stay"]
    reasons: dict[str, list[str]] = {}
    for key, _, reason in graph.fixed:
      reasons.setdefault(reason, []).append("/".join(key[1:-1]))
    for reason, layers in reasons.items():
      names = f"{layers[0]} and {len(layers) - 1} more" if len(layers) > 2 else " and ".join(layers)
      lines.append(textwrap.fill(f"{names}: {reason}", _WIDTH, initial_indent="  ", subsequent_indent="    "))
  return lines


def _in_short(writers: list[str], readers: list[str], width: int) -> str:
  """Returns `conv1 -> conv2, conv3` in at most `width` characters; where names do not fit, numbers of layers."""
  written, read = ", ".join(writers), ", ".join(readers)
  counts = [f"{len(names)} layers" for names in (writers, readers)]
  for text in (f"{written} -> {read}", f"{writers[0]}, ... ({counts[0]}) -> {counts[1]}" if writers else ""):
    if text and len(text) <= width:
      return text
  return f"{counts[0]} -> {counts[1]}"
