"""Which images a command takes: a folder, or a data set by its name."""

from __future__ import annotations

import argparse
from typing import Any

from sapr_jax.errors import InputError


def add_arguments(parser: argparse._ActionsContainer, folder: str) -> None:
  """Adds --data, whose folder holds `folder`, and --source."""
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--data", metavar="DIR", help=f"folder of images: {folder}")
  which.add_argument(
    "--source", metavar="NAME", help="a data set: digits, or one of tensorflow-datasets such as tfds:cifar10"
  )


def fields_of(args: argparse.Namespace) -> dict[str, Any] | None:
  """Returns the images as fields `source`, `name`, `path` of a `DataSpec`; None if none were named."""
  if args.data is not None:
    return {"source": "folder", "path": args.data}
  if args.source is None:
    return None
  source, _, name = args.source.partition(":")
  if source not in ("digits", "tfds") or (source == "tfds") != bool(name):
    raise InputError(f"--source must be digits, or tfds:NAME such as tfds:cifar10, got {args.source!r}.")
  return {"source": source, "name": name or "digits"}
