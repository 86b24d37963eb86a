"""`sapr evaluate`: the accuracy of a saved model."""

from __future__ import annotations

import argparse
from typing import Any

from sapr_jax.commands import images
from sapr_jax.commands.answer import Answer, accuracy_of
from sapr_jax.errors import InputError

SUMMARY = "measure the accuracy of a saved model, on images as it takes them"
EXAMPLES = """\
examples:
  sapr evaluate runs/digits/pruned                       # on the data set of its run
  sapr evaluate runs/resnet50/pruned --data /data/imagenet --split val
  sapr evaluate runs/resnet56/pruned --source tfds:cifar10 --json

A folder of images has test/<class>/*, or val/ or train/ in place of test/. Its classes are
found by name.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="saved model, such as runs/digits/pruned")
  images.add_arguments(parser, "test/<class>/* (or val/, train/)")
  parser.add_argument(
    "--split", choices=("test", "val", "train"), help="which images; unset: test, and val where they are resized"
  )
  parser.add_argument(
    "--batch-size", type=int, default=256, metavar="N", help="images at a time (default: %(default)s)"
  )


def run(args: argparse.Namespace) -> Answer:
  from sapr_jax import artifacts, runtime, training

  given = images.fields_of(args)
  info = artifacts.load_info(args.model)
  if info.inputs is None:
    raise InputError(
      f"{args.model} was saved without its inputs, so how images are normalized is not known; save it again with"
      " sapr_jax.save(..., inputs=sapr_jax.Inputs(shape, mean=..., std=...))."
    )
  fields = given or _of_run(args.model, info.config)
  data, split = _data(fields, args.split)
  runtime.use_compilation_cache()
  on_folder = {"split": args.split} if isinstance(data, str) else {}
  measured = training.evaluate(args.model, data=data, batch_size=args.batch_size, **on_folder)
  name = fields["path"] if isinstance(data, str) else f"{fields['name']}, {split}"
  saved = {key: info.metrics.get(key) for key in ("accuracy", "images")}
  facts = {"model": args.model, "data": name, "split": split, **measured, "saved_with": saved}
  text = f"{args.model}: {accuracy_of(measured)} right, loss {measured['loss']:.4f} ({name})"
  if before := accuracy_of(saved):
    text += f"\nwhen it was saved: {before}"
  return Answer(facts, text)


def _of_run(model: str, config: dict[str, Any]) -> dict[str, Any]:
  """Returns the data set of the run that saved the model, if it can be found by its name."""
  source, name = config.get("data.source"), config.get("data.name")
  if source == "digits":
    return {"source": "digits", "name": "digits"}
  if source == "tfds" and isinstance(name, str):
    return {"source": "tfds", "name": name}
  raise InputError(f"--data or --source is missing, and {model} does not say which images there are; add --data DIR.")


def _data(fields: dict[str, Any], split: str | None) -> tuple[Any, str | None]:
  """Returns what `evaluate` takes, and which split that is, None where it finds out itself."""
  from sapr_jax import data

  if fields["source"] == "folder":
    return fields["path"], split
  if split == "val":
    raise InputError(f"--split must be test or train for {fields['name']}, got val; --data DIR takes a folder val/.")
  dataset = data.load_dataset(data.DataSpec(**fields))
  return (dataset.train, "train") if split == "train" else (dataset.test, "test")
