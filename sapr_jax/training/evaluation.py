"""Accuracy of any model, on arrays or on a folder of images, by the step that a run evaluates with."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax import artifacts
from sapr_jax.channels import check_module, check_variables, checked_kwargs, errors_of_model, evaluation_kwargs
from sapr_jax.checks import check_array, check_integer, check_path, check_type, check_values, shown
from sapr_jax.data import EncodedSource, ImageSplit, Inputs, decode_exactly, evaluation_batches, open_split
from sapr_jax.errors import InputError
from sapr_jax.runtime import cpu
from sapr_jax.runtime.devices import MappedStep, data_mesh, process_slice, replicate
from sapr_jax.training.inputs import Shared
from sapr_jax.training.passes import run_evaluation
from sapr_jax.training.steps import evaluation_step

_TOLERANCE = 1e-3
_SPLITS = ("train", "test", "val")


def evaluate(
  model: nn.Module | str | os.PathLike[str],
  variables: Mapping[str, Any] | None = None,
  data: Any = None,
  *,
  inputs: Inputs | None = None,
  split: str | None = None,
  batch_size: int = 256,
  apply_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Measures a classifier on labelled images.

  Images are read, prepared and sent batch by batch, over all devices; the last batch is filled up, so that one program
  is compiled, and kept for the next call with the same model.

  Args:
    model: A module that maps inputs to logits `[N, classes]`; or the path of a saved model, whose variables and inputs
      are then taken.
    variables: Its variables, all collections.
    data: (images, labels), or the path of a folder `test/<class>/*` (`val` and `train` likewise). Images of bytes
      (uint8) are prepared by `inputs`; others must be what the model takes, normalized already. Labels are the numbers
      of the outputs, `[N]`. Folders of classes are the outputs of the same name, or without `inputs.class_names` all
      outputs in sorted order.
    inputs: How images become inputs; `load_info` returns that of a saved model.
    split: Which of the folders to read; by default `test`, and `val` only where that is missing, or the other way
      around for a network of resized images, as in a run.
    batch_size: Images at a time, on all devices together.
    apply_kwargs: Arguments that choose the evaluation mode; by default those of the usual names that the module takes,
      such as `train=False`.

  Returns:
    "accuracy" in [0, 1], "loss" (mean cross-entropy) and "images", their number.

  Raises:
    InputError: If something does not fit, or images look as if they were normalized in another way.

  Example:
    >>> model = nn.Dense(2)
    >>> variables = {"params": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    >>> evaluate(model, variables, (np.eye(2, dtype=np.float32), [0, 0]))["accuracy"]
    0.5

    Of a saved model: `evaluate("runs/digits/pruned", data="DIR")`.
  """
  if isinstance(model, str | os.PathLike):
    if variables is not None:
      raise InputError("variables must be unset where model is the path of a saved one; call evaluate(path, data=...).")
    inputs = artifacts.load_info(model).inputs if inputs is None else inputs
    model, variables = artifacts.load(model)
  check_module(model)
  check_variables(variables)
  check_values("variables", dict(variables or {}), "evaluate")
  check_integer("batch_size", batch_size, 1)
  if inputs is not None:
    check_type("inputs", inputs, Inputs, "sapr_jax.load_info(path).inputs are those of a saved model")
  mode = _checked_mode(model, apply_kwargs)
  assert variables is not None
  if isinstance(data, str | os.PathLike):
    images = _of_folder(check_path(data), _needed(inputs), split)
  elif split is not None:
    raise InputError(f"split must be unset unless data is a folder, got {shown(split)}.")
  else:
    images = _of_arrays(data, inputs)
  _check_outputs(model, variables, images, mode)
  mesh = data_mesh()
  params = jax.tree.leaves(variables.get("params", {}))
  shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in params)
  step = _mapped_step(model, images.inputs, tuple(mode.items()), shapes)
  shared = Shared(variables=replicate(dict(variables), mesh))
  measured = run_evaluation(step, mesh, shared, _batches(images, batch_size, mesh.devices.size))
  return measured | {"images": round(measured["images"])}


@dataclasses.dataclass(frozen=True)
class _Images:
  """Labelled images.

  Attributes:
    count: How many there are.
    read: Returns images and labels of the given indices.
    inputs: What the step makes inputs of them by.
    classes: One more than the largest label.
    all_classes: Whether there must be as many outputs as classes.
  """

  count: int
  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  inputs: Inputs
  classes: int
  all_classes: bool = False


def _batches(images: _Images, batch_size: int, devices: int) -> Iterator[Any]:
  """Yields the calls of an evaluation step, all of one shape; the next is read while the step is at work."""
  size = -(-min(batch_size, images.count) // devices) * devices
  mine = process_slice(size)
  order, counted = evaluation_batches(images.count, size)
  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    ahead = reader.submit(images.read, order[0, mine])
    for number, weights in enumerate(counted):
      pixels, labels = ahead.result()
      if number + 1 < len(order):
        ahead = reader.submit(images.read, order[number + 1, mine])
      yield {"images": pixels[None], "labels": labels[None]}, weights[None, mine]


def _cached(function: Any) -> Any:
  """Keeps the last results, by arguments; those that cannot be hashed (fields of a module) are computed each time."""
  kept = functools.lru_cache(maxsize=4)(function)

  @functools.wraps(function)
  def wrapped(*args: Any) -> Any:
    try:
      hash(args)
    except TypeError:
      return function(*args)
    return kept(*args)

  return wrapped


@_cached
def _mapped_step(model: nn.Module, taken: Inputs, mode: tuple[tuple[str, Any], ...], shapes: Any) -> MappedStep:
  return cpu.map_step(evaluation_step(model, taken, dict(mode)), data_mesh(), shapes)


def _checked_mode(model: nn.Module, apply_kwargs: Any) -> dict[str, Any]:
  return evaluation_kwargs(model) if apply_kwargs is None else checked_kwargs(apply_kwargs)


def _check_outputs(model: nn.Module, variables: Mapping[str, Any], images: _Images, mode: Mapping[str, Any]) -> None:
  """Runs the model abstractly, and checks that it has an output for each class."""
  one: Any = jax.ShapeDtypeStruct(images.inputs.input_shape, jnp.dtype(images.inputs.dtype))
  with errors_of_model(f"The model, its variables and inputs of shape {one.shape}"):
    logits: Any = jax.eval_shape(lambda v, x: model.apply(v, x, **mode), dict(variables), one)
  if not isinstance(logits, jax.ShapeDtypeStruct) or len(logits.shape) != 2:
    raise InputError(f"model must return logits of shape (n, classes), got {shown(logits)}.")
  outputs = logits.shape[1]
  if outputs < images.classes or (images.all_classes and outputs > images.classes):
    cure = "name the outputs in inputs.class_names" if images.all_classes else "count them from 0"
    raise InputError(
      f"labels must be numbers of the {outputs} outputs of the model, got {images.classes} classes; {cure}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Arrays
# ----------------------------------------------------------------------------------------------------------------------


def _of_arrays(data: Any, inputs: Inputs | None) -> _Images:
  if isinstance(data, ImageSplit):
    data = (data.images, data.labels)
  if not isinstance(data, tuple | list) or len(data) != 2:
    raise InputError(f"data must be (images, labels), or the path of a folder test/<class>/*, got {shown(data)}.")
  for name, value in (("images", data[0]), ("labels", data[1])):
    check_array(name, value)
    if isinstance(value, jax.core.Tracer):
      raise InputError(f"{name} must be concrete, got a traced array; call evaluate outside of jax.jit.")
  images, labels = np.asarray(data[0]), np.asarray(data[1])
  if not len(images.shape) > 1 or not len(images):
    raise InputError(f"images must have the shape (n, ...), and not be empty, got {images.shape}.")
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise InputError(
      f"labels must be integers of at least 0, of shape ({len(images)},), one for each image, got {shown(data[1])}."
    )
  if images.dtype == np.uint8:
    taken = _needed(inputs)
    if images.shape[1:] != taken.shape and taken.resize is None:
      raise InputError(f"images must have the shape {('n', *taken.shape)}, got {images.shape}.")
    taken.prepare(images[:1])  # to refuse others
  else:
    _check_normalized(images, inputs)
    dtype = jax.dtypes.canonicalize_dtype(images.dtype) if inputs is None else inputs.dtype
    taken, images = Inputs(images.shape[1:], jnp.dtype(dtype).name), images.astype(dtype)

  def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return taken.crop(images[indices]), labels[indices].astype(np.int32)

  return _Images(len(images), read, taken, int(labels.max()) + 1)


def _needed(inputs: Inputs | None) -> Inputs:
  if inputs is None:
    raise InputError(
      "inputs must say how images of bytes become inputs of this model: give inputs=sapr_jax.Inputs(shape, mean=...,"
      " std=...), or arrays that are normalized already."
    )
  return inputs


def _check_normalized(images: np.ndarray, inputs: Inputs | None) -> None:
  """Checks, as far as it can be told, that images which are not bytes were normalized as the inputs say."""
  if inputs is None:
    return
  if images.shape[1:] != inputs.shape:
    raise InputError(f"images that are normalized must have the shape {('n', *inputs.shape)}, got {images.shape}.")
  if (limits := inputs.limits()) is None:
    return
  least, most = images.min(axis=(0, 1, 2)), images.max(axis=(0, 1, 2))
  low, high = (limit.astype(np.float64) for limit in limits)
  slack = _TOLERANCE * (high - low)
  if not ((least >= low - slack) & (most <= high + slack)).all():
    raise InputError(
      f"images of {images.dtype} must be normalized as inputs say, so that channels lie between {_numbers(low)} and"
      f" {_numbers(high)}, got {_numbers(least)} to {_numbers(most)}; give bytes (uint8), which are normalized here, or"
      " leave inputs out."
    )


def _numbers(values: Any) -> str:
  return ", ".join(f"{float(value):.3g}" for value in np.ravel(values)[:4])


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------


def _of_folder(path: Any, inputs: Inputs, split: str | None) -> _Images:
  if split is not None and split not in _SPLITS:
    raise InputError(f"split must be one of {', '.join(_SPLITS)}, got {shown(split)}.")
  if len(inputs.shape) != 3 or inputs.shape[-1] not in (1, 3):
    raise InputError(f"inputs must be of images with 1 or 3 channels to read files, got the shape {inputs.shape}.")
  splits = ("test", "val") if inputs.resize is None else ("val", "test")
  source, class_names = open_split(str(path), splits if split is None else (split,))
  numbers = np.arange(len(class_names), dtype=np.int32)
  if inputs.class_names is not None:
    places = {name: place for place, name in enumerate(inputs.class_names)}
    if unknown := [name for name in class_names if name not in places]:
      raise InputError(
        f"the classes of {path} must be classes of the model, {shown(inputs.class_names)}, got {shown(unknown[0])};"
        " rename the folders."
      )
    numbers = np.array([places[name] for name in class_names], np.int32)

  def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, places = np.unique(indices, return_inverse=True)  # the last batch is filled up with the first image
    with concurrent.futures.ThreadPoolExecutor() as pool:
      pixels, labels = zip(*pool.map(lambda index: _read_file(source, int(index), inputs), unique), strict=True)
    return np.stack(pixels)[places], numbers[np.array(labels)][places]

  return _Images(len(source), read, inputs, int(numbers.max()) + 1, inputs.class_names is None)


def _read_file(source: EncodedSource, index: int, inputs: Inputs) -> tuple[np.ndarray, int]:
  """Returns the pixels of an image, cropped as the inputs say, and its label."""
  encoded, label, name = source[index]
  image, is_grayscale = decode_exactly(encoded, name)
  if inputs.shape[-1] == 1 and not is_grayscale:
    raise InputError(f"image {name!r} must be stored as grayscale, as the model takes one channel; convert it.")
  pixels = np.asarray(image) if inputs.recipe is None else inputs.recipe.crop(image)
  pixels = pixels[..., : inputs.shape[-1]]
  if pixels.shape != inputs.shape:
    found, want = ("x".join(map(str, shape[:2])) for shape in (pixels.shape, inputs.shape))
    raise InputError(
      f"image {name!r} must have {want} pixels (height x width), as the model takes them, got {found}; resize it."
    )
  return pixels, label
