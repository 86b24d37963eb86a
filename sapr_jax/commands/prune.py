"""`sapr prune`: a trained network made smaller in one shot, and fine-tuned where there are images."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

from sapr_jax.commands import images, networks
from sapr_jax.commands.answer import Answer, accuracy_of, table
from sapr_jax.errors import InputError

if TYPE_CHECKING:
  from sapr_jax.data import Inputs

SUMMARY = "cut a trained network in one shot; with images, fine-tune it too"
EXAMPLES = """\
examples:
  sapr prune runs/digits/dense small --keep 0.4
  sapr prune runs/digits/dense small --source digits --finetune-epochs 10
  sapr prune resnet50.pth small --network resnet50 --mean 0.485 0.456 0.406 \\
      --std 0.229 0.224 0.225 --resize 256 --data /data/imagenet --finetune-epochs 5

Without images the network is cut as it is, and its accuracy is not known. With them the cut
and the fine-tuning are one run in OUT.run (or --workdir), which the same command resumes.
"""


_FIT_BATCHES = 50
_NEED_IMAGES = ("finetune_epochs", "fit_batches", "distill", "workdir")
_LEAST = {"fit_batches": 0, "finetune_epochs": 0, "batch_size": 1, "min_width": 1, "round_to": 1, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="saved model, or with --network a file of PyTorch weights")
  parser.add_argument("out", metavar="OUT", help="directory of the pruned model")
  how = parser.add_argument_group("what is cut")
  how.add_argument("--keep", type=float, default=0.5, metavar="SHARE", help="of the cost (default: %(default)s)")
  how.add_argument("--cost", default="macs", metavar="COST", help="macs (default), params, prunable_macs, latency")
  how.add_argument("--latency-table", metavar="FILE", help="of sapr latency; unset: times are measured here")
  how.add_argument("--importance", default="l2_norm", metavar="NAME", help="l2_norm (default), l1_norm, taylor, ...")
  how.add_argument("--compare", default="equal_shares", metavar="NAME", help="equal_shares (default) or group_mean")
  how.add_argument(
    "--cost-exponent", type=float, default=0.375, metavar="X", help="prefers cheap channels (default: %(default)s)"
  )
  how.add_argument("--select", default="blocks", metavar="GROUPS", help="blocks (default), unjoined or exact")
  networks.add_patterns(how)
  how.add_argument("--round-to", type=int, metavar="N", help="widths are multiples of it; unset: suits the device")
  how.add_argument("--min-width", type=int, default=1, metavar="N", help="of every group (default: %(default)s)")
  how.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
  after = parser.add_argument_group("images, and fine-tuning on them")
  images.add_arguments(after, "train/<class>/* and test/<class>/* (or val/)")
  after.add_argument(
    "--fit-batches",
    type=int,
    metavar="N",
    help=f"on which weights that stay are fitted to make up for the others; 0: they are not (default: {_FIT_BATCHES})",
  )
  after.add_argument("--finetune-epochs", type=int, default=0, metavar="N", help="default: %(default)s")
  after.add_argument(
    "--distill",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="of the loss that compares with the dense network, such as 0.5; an epoch takes longer (default: %(default)s)",
  )
  after.add_argument("--learning-rate", type=float, default=0.02, metavar="X", help="at first (default: %(default)s)")
  after.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
  after.add_argument("--no-flip", action="store_true", help="images are not mirrored, as for digits and letters")
  after.add_argument("--workdir", metavar="DIR", help="of that run (default: OUT.run)")
  of = parser.add_argument_group("PyTorch weights")
  of.add_argument("--network", metavar="NAME", help="of this package, such as resnet20 or mobilenetv2")
  of.add_argument("--classes", type=int, metavar="N", help="its outputs; unset: as usual for it")
  of.add_argument("--mean", type=float, nargs="+", metavar="X", help="of the pixels in [0, 1] that it was trained on")
  of.add_argument("--std", type=float, nargs="+", metavar="X", help="their deviation")
  of.add_argument("--resize", type=int, metavar="N", help="of images of any size: their shorter side")
  networks.add_shape(parser, "for images of another size than usual, or of a model saved without its inputs")


@dataclasses.dataclass(frozen=True)
class _Dense:
  """The network that is cut: what `SavedNetwork` has, of saved models and of PyTorch's weights alike."""

  model: Any
  variables: Any
  inputs: Inputs
  metrics: dict[str, Any]


def run(args: argparse.Namespace) -> Answer:
  fields = images.fields_of(args)
  if fields is None and (wanted := [name for name in _NEED_IMAGES if getattr(args, name)]):
    raise InputError(f"--{wanted[0].replace('_', '-')} needs images; add --data DIR or --source NAME.")
  out = networks.check_place(args.out, args.model)
  from sapr_jax.runtime.devices import start_jax

  start_jax()
  dense = _open(args)
  _check_options(args, has_images=fields is not None)
  return _cut(args, dense, out) if fields is None else _run(args, dense, out, fields)


def _open(args: argparse.Namespace) -> _Dense:
  of_torch = [name for name in ("classes", "mean", "std", "resize") if getattr(args, name) is not None]
  if args.network is None:
    if of_torch:
      raise InputError(f"--{of_torch[0]} is for PyTorch weights; add --network, or leave it out.")
    if os.path.isfile(args.model):
      raise InputError(f"{args.model} is a file; name its network, such as --network resnet20.")
    saved = networks.open_saved(args.model, args.input_shape)
    return _Dense(saved.model, saved.variables, saved.inputs, saved.info.metrics)
  if os.path.isdir(args.model):
    raise InputError(f"--network must be left out for {args.model}, a directory, whose model has its own.")
  from sapr_jax import artifacts, models
  from sapr_jax.data import Inputs

  model = models.create(args.network, **({} if args.classes is None else {"num_classes": args.classes}))
  inputs = Inputs(args.input_shape or networks.usual_shape(model), mean=args.mean, std=args.std, resize=args.resize)
  return _Dense(model, artifacts.import_torch(args.model, model, inputs.input_shape), inputs, {})


def _check_options(args: argparse.Namespace, *, has_images: bool) -> None:
  from sapr_jax.channels import SELECTIONS
  from sapr_jax.method import COMPARISONS, COSTS, IMPORTANCES, measured_costs

  for name, known in (
    ("importance", IMPORTANCES),
    ("compare", COMPARISONS),
    ("cost", COSTS),
    ("select", SELECTIONS),
  ):
    if (value := getattr(args, name)) not in known:
      raise InputError(f"--{name} must be one of {', '.join(known)}, got {value!r}.")
  if args.latency_table is not None and args.cost not in (costs := measured_costs()):
    raise InputError(f"--latency-table must be left out where --cost is {args.cost}; add --cost {' or '.join(costs)}.")
  for name, least in _LEAST.items():
    if (number := getattr(args, name)) is not None and number < least:
      raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {number}.")
  if not 0 < args.keep <= 1:
    raise InputError(f"--keep must be a number in (0, 1], got {args.keep}; it is the share of the cost to keep.")
  if not 0 <= args.cost_exponent < math.inf:
    raise InputError(f"--cost-exponent must be a number of at least 0, got {args.cost_exponent}.")
  if not 0 <= args.distill <= 1:
    raise InputError(f"--distill must be a number in [0, 1], got {args.distill}; it is a share of the loss.")
  if args.distill and not args.finetune_epochs:
    raise InputError(f"--distill {args.distill:g} needs fine-tuning; add --finetune-epochs N.")
  if not 0 < args.learning_rate < math.inf:
    raise InputError(f"--learning-rate must be a number above 0, got {args.learning_rate}.")
  if args.importance == "taylor" and not has_images:
    raise InputError("--importance taylor needs images; add --data DIR or --source NAME, or take l2_norm.")


def _cut(args: argparse.Namespace, dense: _Dense, out: pathlib.Path) -> Answer:
  """Cuts the network without an image."""
  import jax

  from sapr_jax import artifacts, channels, method

  model, variables, inputs = dense.model, dense.variables, dense.inputs
  chosen = networks.chosen_groups(args)
  graph = channels.trace_channels(model, variables, inputs.input_shape, input_dtype=inputs.dtype, **chosen)

  def times() -> method.LatencyTable:
    from sapr_jax import training  # takes a while to import

    base = model.base if isinstance(model, channels.NarrowModule) else model
    return training.table_for(model, variables, graph, path=args.latency_table, dtype=jax.numpy.dtype(base.dtype).name)

  budget = method.make_budget(graph, method.cost_of(args.cost, graph, times), share=args.keep)
  round_to = args.round_to
  if round_to is None:
    round_to = method.default_round_to(graph, budget, jax.devices()[0].platform, min_width=args.min_width)
  method.check_budget(graph, budget, min_width=args.min_width, round_to=round_to)
  importance = method.score_channels(
    args.importance, variables["params"], graph, gradients=dict, key=lambda: jax.random.key(args.seed)
  )
  scores = method.make_comparable(
    jax.device_get(importance), graph, budget.cost, compare=args.compare, cost_exponent=args.cost_exponent
  )
  masks = method.project_to_budget(graph, scores, budget, min_width=args.min_width, round_to=round_to)
  small = channels.prune(model, variables, graph, masks)
  before: dict[str, Any] = {name: dense.metrics[name] for name in ("accuracy", "images") if name in dense.metrics}
  before |= {"macs": graph.macs(), "params": artifacts.count_params(variables)}
  metrics = {"macs": graph.macs(masks), "params": artifacts.count_params(small[1]), "dense": before}
  names = ("keep", "cost", "importance", "compare", "cost_exponent", "min_width", "seed")
  config = {name: getattr(args, name) for name in names} | {"round_to": round_to, **chosen}
  artifacts.save(out, *small, inputs=inputs, metrics=metrics, config={"prune": config})
  hint = "Its accuracy is not known, and falls by a cut: add --data DIR --finetune-epochs N, or train it further."
  return _answer(out, {"dense": before, "pruned": {k: metrics[k] for k in ("macs", "params")}}, hint)


def _run(args: argparse.Namespace, dense: _Dense, out: pathlib.Path, fields: dict[str, Any]) -> Answer:
  """Cuts and fine-tunes the network by a run of this package that begins with the cut."""
  from sapr_jax import artifacts, training

  if dense.inputs.mean is None:
    raise InputError(
      "--mean and --std are missing: on images normalized otherwise than it learned a network is of no use."
      if args.network
      else f"{args.model} was saved without its normalization; save it again with"
      " inputs=sapr_jax.Inputs(shape, mean=..., std=...)."
    )
  workdir = args.workdir or f"{os.fspath(out).rstrip(os.sep)}.run"
  result = training.run(_config(args, dense, fields), workdir)
  pruned = result.workdir / "pruned"
  info = artifacts.load_info(pruned)
  artifacts.save(out, *artifacts.load(pruned), inputs=info.inputs, metrics=info.metrics, config=info.config)
  rows = {name: result.summary[name] for name in ("dense", "subnetwork", "pruned")}
  measured = ("accuracy", "loss", "macs", "params")
  rows = {name: {key: row[key] for key in measured if key in row} for name, row in rows.items()}
  if not args.finetune_epochs:
    del rows["subnetwork"]  # it is the pruned network
  return _answer(out, rows, f"The run is in {result.workdir}.")


def _config(args: argparse.Namespace, dense: _Dense, fields: dict[str, Any]) -> Any:
  """Returns the configuration of a run that cuts the network as it is, and fine-tunes it."""
  import jax.numpy as jnp

  from sapr_jax import configs
  from sapr_jax.channels import NarrowModule

  base = dense.model.base if isinstance(dense.model, NarrowModule) else dense.model
  inputs, is_digits = dense.inputs, fields["source"] == "digits"
  config = configs.get("default")
  changes = {f"data.{name}": value for name, value in fields.items()} | {
    "seed": args.seed,
    "model.name": networks.name_of(base),
    "model.width_multiplier": float(base.width_multiplier),
    "model.dtype": jnp.dtype(base.dtype).name,
    "init.weights": args.model,
    "data.mean": inputs.mean,
    "data.std": inputs.std,
    "data.stream": inputs.resize is not None,
    "data.flip": not (args.no_flip or is_digits),
    "data.crop_padding": 1 if is_digits else 4,
    "train.epochs": 0,
    "train.decay_epochs": (),
    "train.batch_size": args.batch_size,  # of the fit at the cut, and of the renewed statistics
    "prune.start_epoch": 0,
    "prune.proposer": args.importance,
    "prune.cost": args.cost,
    "prune.latency_table": args.latency_table,
    "prune.p": args.keep,
    "prune.select": args.select,
    "prune.include": tuple(args.include or ()),
    "prune.exclude": tuple(args.exclude or ()),
    "prune.min_width": args.min_width,
    "prune.compensation_batches": _FIT_BATCHES if args.fit_batches is None else args.fit_batches,
    "prune.round_to": args.round_to,
    "importance.compare": args.compare,
    "importance.cost_exponent": args.cost_exponent,
    "finetune.epochs": args.finetune_epochs,
    "finetune.batch_size": args.batch_size,
    "finetune.learning_rate": args.learning_rate,
    "finetune.schedule": "cosine",
    "finetune.decay_epochs": (),
    "finetune.weight_decay": 5e-4,
    "finetune.distillation.weight": args.distill,
    "generator.batch_size": args.batch_size,  # of the gradients of taylor
  }
  if inputs.resize is not None:
    changes |= {"data.image_size": inputs.shape[0], "data.eval_resize": inputs.resize}
  config.update_from_flattened_dict(changes)
  return config


def _answer(out: pathlib.Path, rows: dict[str, Any], last: str) -> Answer:
  from sapr_jax import artifacts

  info = artifacts.load_info(out)
  widths = {layer: {"dense": full, "kept": kept} for layer, (full, kept) in info.widths.items()}
  cells = [["network", "accuracy", "MACs", "of dense", "parameters", "of dense"]]
  names = {"dense": "dense", "subnetwork": "pruned, before fine-tuning", "pruned": "pruned"}
  for name, row in rows.items():
    shares = [f"{row[cost] / rows['dense'][cost]:.1%}" for cost in ("macs", "params")]
    accuracy = accuracy_of({"accuracy": row.get("accuracy")}) or "-"
    cells.append([names[name], accuracy, f"{row['macs']:,}", shares[0], f"{row['params']:,}", shares[1]])
  layers = [["layer", "dense", "kept"], *([k, str(v["dense"]), str(v["kept"])] for k, v in widths.items())]
  text = f"{table(layers, [1, 2])}\n\n{table(cells, [1, 2, 3, 4, 5])}\n\n{out} is saved. {last}"
  return Answer({"out": str(out), **rows, "widths": widths}, text)
