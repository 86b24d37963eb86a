"""Reads state dicts: `.safetensors` files, and with PyTorch installed files of torch.save."""

from __future__ import annotations

import argparse
import errno
import pathlib
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from sapr_jax.artifacts.saved_model import read_tensors
from sapr_jax.artifacts.torch_names import listed
from sapr_jax.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt", ".th")
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file by name.

  A checkpoint may hold more, and the state dict under a name such as "state_dict" or "model". Nothing in a file is
  executed: torch.load runs with `weights_only=True`. The arrays may be views of one another.

  Raises:
    InputError: If the file is missing, damaged, of another kind, has no state dict or holds more than data, or if
      PyTorch is needed and not installed.
  """
  try:
    if stat.S_ISFIFO(path.stat().st_mode):  # opening it would wait for a writer
      raise OSError(errno.EINVAL, "it is a pipe")
    path.open("rb").close()
  except OSError as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    raise InputError(f"{path} {why}; give a .safetensors or .pth file.") from None
  if path.suffix in TORCH_SUFFIXES:
    return _read_torch(path)
  if path.suffix != ".safetensors":
    raise InputError(
      f"{path} has an unknown ending; expected .safetensors or {', '.join(TORCH_SUFFIXES)}, or the directory of a saved"
      " model."
    )
  return {name: np.asarray(array) for name, array in read_tensors(path).items()}


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecated storages and pickle protocols: nothing that a user could change
    try:
      import torch  # an extra, and slow to import
    except ImportError:
      raise InputError(
        f"{path} needs PyTorch, which is not installed; run: pip install 'sapr_jax[torch]', or convert the file to"
        " .safetensors."
      ) from None
    try:
      if zipped := zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
          if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
      # Scripts save their options as a Namespace. With mmap, the state of an optimizer stays on disk.
      with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
      arrays = {}
      for name, tensor in _find_tensors(content, torch.Tensor).items():
        if tensor.dtype == torch.bfloat16:  # NumPy has none of its own
          arrays[name] = tensor.detach().view(torch.int16).numpy().view(jnp.bfloat16)
        else:
          arrays[name] = tensor.detach().numpy()
    except Exception as error:  # torch.load raises many kinds for damage
      raise InputError(f"{path} {_explain(error)}") from None
  if not arrays:
    keys = listed([str(key) for key in content]) if isinstance(content, dict) else ""
    what = f"a dictionary of {keys or 'nothing'}" if isinstance(content, dict) else "no dictionary"
    raise InputError(
      f"{path} must hold tensors by name, alone or under one of {', '.join(_WRAPPERS)}; it holds {what}. Save"
      " model.state_dict()."
    )
  return arrays


def _explain(error: Exception) -> str:
  """Returns what is wrong with a file. PyTorch's own message has many lines, and advises to execute the file."""
  reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
  if foreign := re.search(r"GLOBAL (\S+)", reason):
    return (
      f"contains {listed([foreign[1]])}, which is not a tensor; save the state dict alone:"
      " torch.save(model.state_dict(), path)."
    )
  reason = re.split(r"\.\s|\n", reason)[0] or type(error).__name__
  return f"cannot be read as a file of torch.save ({listed([reason])}); copy it, or save model.state_dict() again."


def _find_tensors(content: Any, kind: type) -> dict[str, Any]:
  """Returns the tensors of the innermost dictionary that has some."""
  for state in _dictionaries(content):
    if tensors := {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, kind)}:
      return tensors
  return {}


def _dictionaries(content: Any, depth: int = 3) -> Iterator[dict[Any, Any]]:
  """Yields the dictionaries of a checkpoint under the known names, inner ones first."""
  if isinstance(content, dict) and depth:
    for name in _WRAPPERS:
      yield from _dictionaries(content.get(name), depth - 1)
    yield content
