"""`sapr export`: a saved model as one file that runs without this package."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from sapr_jax.commands.answer import Answer, size_of
from sapr_jax.commands.networks import add_shape, open_saved
from sapr_jax.errors import InputError

SUMMARY = "write a saved model as one file to serve: StableHLO, ONNX, PyTorch"
EXAMPLES = """\
examples:
  sapr export runs/digits/pruned digits.onnx
  sapr export runs/resnet50/pruned net.stablehlo --dtype bfloat16 --uint8
  sapr export runs/resnet56/pruned weights --format safetensors

The file runs without this package. Without --uint8 it takes normalized images, as the network
does. Beside it, FILE.json says what goes in and comes out. ONNX needs pip install 'sapr_jax[onnx]'.
"""
FORMATS = ("stablehlo", "onnx", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="saved model, such as runs/digits/pruned")
  parser.add_argument("file", metavar="FILE", help="file to write; its suffix chooses the format")
  parser.add_argument("--format", choices=FORMATS, help="adds the suffix where FILE has none of them")
  parser.add_argument("--batch", type=int, metavar="N", help="images in a call; unset: any number")
  parser.add_argument("--dtype", metavar="DTYPE", help="compute and store kernels in it: bfloat16, float16, float32")
  parser.add_argument("--uint8", action="store_true", help="take images of bytes, and normalize them inside")
  add_shape(parser, "where MODEL was saved without its inputs")


def run(args: argparse.Namespace) -> Answer:
  file = _file(args.file, args.format)
  from sapr_jax import artifacts

  saved = open_saved(args.model, args.input_shape)
  inputs, options = saved.inputs, dict[str, Any](batch=args.batch, dtype=args.dtype)
  if args.uint8:
    if inputs.mean is None:
      raise InputError(f"--uint8 needs the normalization of {args.model}, which was saved without; leave it out.")
    options |= {"preprocess": inputs.normalize}
  elif file.suffix != ".safetensors":
    options |= {"input_dtype": inputs.dtype}
  if file.suffix != ".safetensors":
    options |= {"class_names": inputs.class_names}
  artifacts.export(file, saved.model, saved.variables, inputs.input_shape, **options)
  kind = "weights in PyTorch's names"
  if file.suffix != ".safetensors":
    takes = "uint8" if args.uint8 else f"{inputs.dtype}, normalized" if inputs.mean is not None else inputs.dtype
    kind = f"takes [{args.batch or 'any number'}, {', '.join(map(str, inputs.shape))}] of {takes}"
  size = file.stat().st_size
  facts = {"file": str(file), "bytes": size, "format": file.suffix[1:], "input_shape": list(inputs.shape)}
  facts |= {"uint8": args.uint8, "batch": args.batch}
  return Answer(facts, f"{file} is written ({size_of(size)}): {kind}.")


def _file(name: str, kind: str | None) -> pathlib.Path:
  file = pathlib.Path(name)
  suffix = file.suffix.removeprefix(".")
  if kind is None and suffix not in FORMATS:
    raise InputError(f"FILE must end in {', '.join('.' + known for known in FORMATS)}, got {name!r}; or add --format.")
  if kind is not None and suffix in FORMATS and suffix != kind:
    raise InputError(f"FILE ends in .{suffix} and --format is {kind}; leave --format out, or name another file.")
  return file if suffix in FORMATS else file.with_name(f"{file.name}.{kind}")
