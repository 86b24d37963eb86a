"""A model as a directory: definition as JSON, weights as safetensors, checksums. Nothing in it is executed on loading.

model.json            class and fields of the module, widths of pruned layers or cuts, variables with shapes and dtypes,
                      SHA-256 of the weights
weights.safetensors   every variable under its path: "params/stage1_block1/conv1/kernel"
info.json             what it takes, what was measured, how it was made, if that was given; see model_info.py
README.md             the same for people; may be edited
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from sapr_jax.artifacts.definition import DEFINITION, NNX, base_from_json, check_base, definition_of
from sapr_jax.artifacts.files import (
  json_text,
  read_bytes,
  sha256,
  sha256_of_entries,
  temporary_prefix,
  write_atomically,
  write_json,
)
from sapr_jax.artifacts.model_card import CARD, model_card
from sapr_jax.artifacts.model_info import INFO, ModelInfo, info_from_json, info_to_json
from sapr_jax.channels import NarrowModule, are_cuts, check_variables, is_nnx, network_of
from sapr_jax.checks import check_concrete, check_path, is_integer, shown
from sapr_jax.data import Inputs
from sapr_jax.errors import InputError, one_line, os_errors_in_one_line

if TYPE_CHECKING:
  from flax import nnx  # takes a while to import

FORMAT = 1
WEIGHTS = "weights.safetensors"
_WIDTH_FIELDS = {"features", "feature_group_count"}


def save(
  path: str | os.PathLike[str],
  model: nn.Module | nnx.Module,
  variables: Any = None,
  *,
  inputs: Inputs | None = None,
  metrics: Mapping[str, Any] | None = None,
  config: Any = None,
) -> None:
  """Writes a model to the directory `path`.

  The directory appears whole or not at all; one that holds a saved model already is replaced. With any of the keyword
  arguments it also gets `info.json`, for `load_info`, and a model card in `README.md`, in the form that Hugging Face
  reads.

  Args:
    path: Directory; its parents are made.
    model: A module of this package, any other, or the `NarrowModule` of either; or a module of Flax NNX.
    variables: Its variables, all collections; left out for a module of NNX, `save(path, module)`. Names of modules must
      not contain a slash (Flax's never do).
    inputs: What the model takes. Without it nobody can tell later how images were normalized.
    metrics: What was measured; `ModelInfo` says which names the card knows. Numbers of NumPy and JAX will do.
    config: How it was made: a mapping, a dataclass or a ConfigDict of what JSON can hold.

  Raises:
    InputError: If `path` exists and is not a saved model or cannot be written, `variables` hold something else than
      arrays of numbers, the model does not take such inputs or has another number of outputs than `inputs.class_names`,
      or `metrics` or `config` hold what JSON cannot.

  Example:
    >>> import tempfile
    >>> import flax.linen as nn
    >>> import jax
    >>> model, place = nn.Dense(2), tempfile.mkdtemp() + "/model"
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> save(place, model, variables, inputs=Inputs((3,)), metrics={"accuracy": 0.9})
    >>> load_info(place).macs, load_info(place).metrics
    (6, {'accuracy': 0.9})
  """
  path = pathlib.Path(os.path.abspath(check_path(path)))
  _, variables, more = network_of(model, variables, ())
  if more:
    raise InputError(f"a module of NNX must be saved alone, as it holds its variables, got {shown(more[0])} too.")
  if is_nnx(model):
    from sapr_jax.channels.nnx import storable  # takes a while to import

    variables = storable(variables)
  named = named_arrays(variables)
  info = None
  if not (inputs is None and metrics is None and config is None):
    info = info_to_json(model, variables, inputs, metrics, config)
  with os_errors_in_one_line(path):
    if os.path.lexists(path) and not (path / DEFINITION).is_file():
      raise InputError(f"{path} exists and is not a saved model; name a new directory, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
    try:
      flat = {name: jnp.asarray(leaf) for name, leaf in named.items()}
      weights = safetensors.flax.save(flat)
      write_atomically(temporary / WEIGHTS, weights)
      shapes = {name: {"shape": leaf.shape, "dtype": leaf.dtype.name} for name, leaf in sorted(flat.items())}
      definition = {"format": FORMAT, **definition_of(model), "variables": shapes}
      checksums = {WEIGHTS: sha256(weights), DEFINITION: sha256_of_entries(definition)}
      if info is not None:
        checksums[INFO] = sha256(content := json_text(info).encode())
        write_atomically(temporary / INFO, content)
        write_atomically(temporary / CARD, model_card(info_from_json(info, definition)))
      definition["sha256"] = checksums
      write_json(temporary / DEFINITION, definition)
      os.chmod(temporary, 0o755)
      _replace_directory(temporary, path)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise


@overload
def load(path: str | os.PathLike[str], *, base: nnx.Module) -> nnx.Module: ...


@overload
def load(path: str | os.PathLike[str], *, base: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]: ...


def load(path: str | os.PathLike[str], *, base: Any = None) -> Any:
  """Reads a model that `save` wrote.

  Args:
    path: The directory.
    base: The module that was saved or pruned. Needed if its class is not one of this package, because code is never
      looked up by a name in a file. Of NNX the dense module, whose arrays do not matter, so that
      `nnx.eval_shape(lambda: Net(nnx.Rngs(0)))` is enough; it stays as it is.

  Returns:
    (model, variables). The model is a `NarrowModule` if it was pruned. A module of NNX is returned alone.

  Raises:
    InputError: If a file is missing, damaged or of another format, the variables are not those that the definition
      lists, or the class is unknown; the message names the file or the variable.
  """
  path = check_path(path)
  definition = _read_definition(path)
  is_module = definition.get("library") == NNX
  if base is not None or is_module:
    check_base(base, definition["base"], path, is_module)
  weights = path / WEIGHTS
  if sha256(_read_part(weights)) != definition["sha256"][WEIGHTS]:
    raise InputError(f"{weights} is damaged: its SHA-256 is not the one in {DEFINITION}; copy or save the model again.")
  flat = read_tensors(weights)
  described = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in definition["variables"].items()}
  found = {name: (leaf.shape, leaf.dtype.name) for name, leaf in flat.items()}
  for name in sorted(described.keys() | found.keys()):
    if described.get(name) != found.get(name):
      raise InputError(f"{path}: {name} is {found.get(name)}; {DEFINITION} says {shown(described.get(name))}.")
  try:
    variables = traverse_util.unflatten_dict({tuple(name.split("/")): leaf for name, leaf in flat.items()})
  except (AttributeError, TypeError) as error:
    raise InputError(
      f"{weights} is damaged: a name is that of an array and of a module; save the model again."
    ) from error
  cuts = tuple((name, axis, size, tuple(map(tuple, parts))) for name, axis, size, parts in definition.get("cuts", ()))
  if is_module:
    from sapr_jax.channels.nnx import restored  # takes a while to import

    return restored(base, variables, cuts)
  if base is None:
    base = base_from_json(definition["base"], path)
  if not definition["widths"] and not cuts:
    return base, variables
  widths = tuple((layer, tuple(sorted(fields.items()))) for layer, fields in sorted(definition["widths"].items()))
  return NarrowModule(base, widths, cuts), variables


def load_info(path: str | os.PathLike[str]) -> ModelInfo:
  """Reads what is known of a model that `save` wrote, beside its weights.

  Of a model that was saved without any, it has the widths and the number of parameters alone.

  Raises:
    InputError: If a file is missing, damaged, edited or of another format; the message names it.
  """
  path = check_path(path)
  definition = _read_definition(path)
  file, checksum = path / INFO, definition["sha256"].get(INFO)
  if checksum is None:
    if os.path.lexists(file):
      raise InputError(f"{file} is not of this model, as {DEFINITION} does not name it; save the model again with it.")
    return info_from_json(None, definition)
  content = _read_part(file)
  if sha256(content) != checksum:
    raise InputError(
      f"{file} is damaged or was edited: its SHA-256 is not the one in {DEFINITION}; copy or save the model again."
    )
  try:
    return info_from_json(json.loads(content), definition)
  except InputError as error:
    raise InputError(f"{file} cannot be used: {error}") from None
  except (ValueError, RecursionError) as error:
    raise InputError(f"{file} is damaged ({one_line(error, 120)}); copy or save the model again.") from None


def is_whole(path: pathlib.Path) -> bool:
  """Returns whether a directory holds a saved model with the weights, and what is known of it, that were written.

  Raises:
    OSError: If a file is there and cannot be read.
  """
  try:
    checksums = _read_definition(path)["sha256"]
    return all(checksums[name] == sha256(read_bytes(path / name)) for name in checksums.keys() & {WEIGHTS, INFO})
  except (FileNotFoundError, InputError):
    return False


def _read_part(file: pathlib.Path) -> bytes:
  """Reads a file of a saved model; raises `InputError` if it is missing or cannot be read."""
  try:
    return read_bytes(file)
  except OSError as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    raise InputError(f"{file} {why}; the directory is incomplete, save the model again.") from error


def named_arrays(variables: Any) -> dict[str, Any]:
  """Returns path with slashes -> array, for the variables that are to be written.

  Raises:
    InputError: If they hold something else than arrays of numbers, or a name that cannot be written; the message names
      the variable.
  """
  check_variables(variables)
  check_concrete("variables", dict(variables), "it")
  named = {}
  for key, leaf in traverse_util.flatten_dict(dict(variables)).items():
    name = "/".join(map(str, key))
    if any(not isinstance(part, str) or "/" in part for part in key):
      raise InputError(f"The variable {key} has a slash in a name, which separates names in a file, or is no text.")
    if not _is_name(name):
      raise InputError(f"The variable {key} has an empty name, or one of dots; rename it.")
    if not isinstance(leaf, jax.Array | np.ndarray) or not _is_numeric(leaf.dtype):
      raise InputError(
        f"variables must hold arrays of numbers to be written, got {shown(leaf)} at {name}; leave it out, or give its"
        " numbers (jax.random.key_data of a random key)."
      )
    named[name] = leaf
  return named


def _is_numeric(dtype: Any) -> bool:
  return bool(jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_))


def read_tensors(file: pathlib.Path) -> dict[str, jax.Array]:
  """Reads a safetensors file; raises `InputError` if it is damaged or cannot be read."""
  try:
    return safetensors.flax.load_file(str(file))
  # The last two: a dtype that NumPy lacks.
  except (OSError, safetensors.SafetensorError, AttributeError, KeyError) as error:
    raise InputError(
      f"{file} is not a whole safetensors file of ordinary numbers ({one_line(error, 120)}); copy or save it again."
    ) from None


def _read_definition(path: pathlib.Path) -> dict[str, Any]:
  file = path / DEFINITION
  try:
    definition = json.loads(read_bytes(file))
  except OSError as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    raise InputError(f"{file} {why}; {path} is not the directory of a saved model.") from None
  except (ValueError, RecursionError) as error:
    raise InputError(f"{file} is damaged ({one_line(error, 120)}); copy or save the model again.") from None
  found = definition.get("format") if isinstance(definition, dict) else None
  if found != FORMAT:
    raise InputError(f"{file} has format {shown(found)}; this version reads format {FORMAT}.")
  try:
    whole = (
      isinstance(definition["base"]["class"], str)
      and isinstance(definition["base"]["fields"], dict)
      and isinstance(definition["sha256"][WEIGHTS], str)
      and all(_are_widths(fields) for fields in definition["widths"].values())
      and all(_is_variable(name, entry) for name, entry in definition["variables"].items())
      and are_cuts(definition.get("cuts", []))
    )
  except (AttributeError, KeyError, TypeError):
    whole = False
  if not whole:
    raise InputError(f"{file} is damaged: entries are missing or of the wrong kind; copy or save the model again.")
  # Models that older versions saved have no such checksum.
  if definition["sha256"].get(DEFINITION, sha256_of_entries(definition)) != sha256_of_entries(definition):
    raise InputError(f"{file} is damaged or was edited: its SHA-256 is another; copy or save the model again.")
  return definition


def _are_widths(fields: Mapping[str, Any]) -> bool:
  return fields.keys() <= _WIDTH_FIELDS and all(is_integer(width) and 0 < width < 2**31 for width in fields.values())


def _is_variable(name: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether a name could be a variable of Flax, and its entry has a list as shape and a dtype."""
  return _is_name(name) and isinstance(entry["shape"], list) and isinstance(entry["dtype"], str)


def _is_name(name: str) -> bool:
  return not {"", ".", ".."} & set(name.split("/"))


def _replace_directory(new: pathlib.Path, path: pathlib.Path) -> None:
  """Puts `new` in the place of `path`, which may hold an older model."""
  old = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
  if path.exists():
    os.replace(path, old / path.name)
  os.replace(new, path)
  shutil.rmtree(old)


def count_params(variables: Mapping[str, Any]) -> int:
  """Counts the trainable parameters."""
  return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(variables["params"]))
