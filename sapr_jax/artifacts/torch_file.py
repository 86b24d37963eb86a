"""Reads the tensors of a file that torch.save wrote, without PyTorch and without unpickling it.

Two formats are in use. Since PyTorch 1.6 a file is a zip archive whose entries are not compressed: `NAME/data.pkl` says
which tensors there are, `NAME/data/KEY` holds the numbers of one storage, `NAME/byteorder` their byte order. Before, it
was a sequence of pickles (a magic number, a version, facts on the system, the object, the keys of the storages) and
then the storages, each after an int64 that counts its entries, little-endian.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sapr_jax.artifacts.torch_pickle import ForeignGlobal, Storage, StoredTensor, read_pickle
from sapr_jax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
_MAX_AXES = 32  # of an array of NumPy 1

_Bytes = bytes | memoryview


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the state dict in a file of torch.save.

  A checkpoint may hold more, and the state dict under a name such as "state_dict" or "model"; only the tensors of that
  are read. Memory stays within a small multiple of the file's size.

  Args:
    path: File in either format of torch.save.

  Returns:
    Name -> array in the file's dtype. Arrays may be views of one another and are not to be written to.

  Raises:
    InputError: If it is no such file, is truncated or damaged, holds no state dict, or names anything that a state dict
      does not have; nothing in the file is ever executed.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      start = file.read(4)
    read = _read_zip if start == b"PK\x03\x04" else _read_legacy
    return read(path)
  except InputError:
    raise
  except OSError as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
    raise InputError(f"{path} {why}; give a file of torch.save, or .safetensors.") from None
  except ForeignGlobal as error:
    raise InputError(
      f"{path} contains {error}, which is not a tensor; save the state dict alone:"
      " torch.save(model.state_dict(), path)."
    ) from None
  # zipfile meets damage with many kinds of errors.
  except (ValueError, KeyError, EOFError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
    why = str(error.args[0]) if error.args else type(error).__name__
    raise InputError(
      f"{path} is truncated or damaged ({' '.join(why.split())[:200]}); copy or save it again."
    ) from None


# ----------------------------------------------------------------------------------------------------------------------
# The formats
# ----------------------------------------------------------------------------------------------------------------------


def _read_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(path) as archive:
    _check_entries(archive.infolist(), path.stat().st_size)
    entries = archive.namelist()
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise ValueError(f"the archive has {len(pickles)} entries data.pkl, not one")
    folder = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
      raise ValueError("its entry byteorder is neither little nor big")
    content, _ = read_pickle(io.BytesIO(archive.read(pickles[0])))
    tensors = _find_state_dict(content, path)
    return _arrays(tensors, lambda storage: archive.read(f"{folder}data/{storage.key}"), order.decode())


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
  """Refuses what could unfold to more than the file: compression, lengths that lie, entries that overlap."""
  for entry in entries:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
      raise ValueError("an entry of the archive is compressed, which torch.save does not do")
  if sum(entry.file_size for entry in entries) > size:
    raise ValueError("the entries of the archive claim to be longer than the file")


def _read_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
  content = path.read_bytes()
  file = io.BytesIO(content)
  try:
    magic, _ = read_pickle(file)
  except (ValueError, ForeignGlobal):
    magic = None
  if type(magic) is not int or magic != _LEGACY_MAGIC:
    kind = "it is empty" if not content else f"it begins with {content[:8]!r}"
    raise InputError(f"{path} is no file of torch.save ({kind}); give one, or a .safetensors file.")
  (version, _), _, (saved, storages), (keys, _) = (read_pickle(file) for _ in range(4))
  if version != _LEGACY_VERSION or not isinstance(keys, list):
    raise ValueError("its header is not that of torch.save")
  tensors = _find_state_dict(saved, path)
  places = _legacy_places(content, file.tell(), keys, storages)
  return _arrays(tensors, lambda storage: memoryview(content)[places[storage.key]], "little")


def _legacy_places(content: bytes, position: int, keys: list[Any], storages: Mapping[str, Storage]) -> dict[str, slice]:
  """Returns key -> bytes of each storage. The file has its number of entries; their size is in the pickle alone."""
  places: dict[str, slice] = {}
  for key in keys:
    if not isinstance(key, str) or key not in storages:
      raise ValueError("it lists a storage that no tensor has")
    (count,) = struct.unpack_from("<q", content, position)
    position += 8
    end = position + count * storages[key].dtype.itemsize
    if not position <= end <= len(content):
      raise ValueError(f"storage {key} should end at byte {end} of {len(content)}")
    places[key] = slice(position, end)
    position = end
  return places


# ----------------------------------------------------------------------------------------------------------------------
# The state dict and its arrays
# ----------------------------------------------------------------------------------------------------------------------


def _find_state_dict(content: Any, path: pathlib.Path) -> dict[str, StoredTensor]:
  for _ in range(3):
    if not isinstance(content, dict):
      break
    wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
    if not wrapped:
      tensors = {key: value for key, value in content.items() if isinstance(value, StoredTensor)}
      if not tensors or not all(isinstance(key, str) for key in tensors):
        break
      return tensors
    # A checkpoint may have the model's configuration under "model" and its weights under another name.
    content = next((c for c in wrapped if any(isinstance(v, StoredTensor) for v in c.values())), wrapped[0])
  what = f"a dictionary of {_keys(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
  raise InputError(
    f"{path} holds no state dict but {what}; expected tensors by name, or such a dictionary under one of"
    f" {', '.join(_WRAPPERS)}."
  )


def _keys(content: Mapping[Any, Any]) -> str:
  names = [ascii(key)[:40] for key in list(content)[:8]]
  return ", ".join(names) + (f" and {len(content) - 8} more" if len(content) > 8 else "") if names else "nothing"


def _arrays(
  tensors: Mapping[str, StoredTensor], read_storage: Callable[[Storage], _Bytes], byteorder: str
) -> dict[str, np.ndarray]:
  entries: dict[str, np.ndarray] = {}
  arrays = {}
  for name, tensor in tensors.items():
    _check_tensor(name, tensor)
    key = tensor.storage.key
    if key not in entries:
      entries[key] = _entries(name, tensor.storage, read_storage(tensor.storage), byteorder)
    strides = tuple(stride * entries[key].itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(entries[key][tensor.offset :], tensor.shape, strides, writeable=False)
    arrays[name] = view if view.size else np.zeros(tensor.shape, view.dtype)
  return arrays


def _check_tensor(name: str, tensor: StoredTensor) -> None:
  """Checks that a tensor lies in its storage, in Python's unbounded integers."""
  shape, strides = tensor.shape, tensor.strides
  whole = (
    isinstance(tensor.storage, Storage)
    and isinstance(shape, tuple)
    and isinstance(strides, tuple)
    and len(shape) == len(strides) <= _MAX_AXES
    and all(type(number) is int and 0 <= number < 2**48 for number in (tensor.offset, *shape, *strides))
  )
  if not whole:
    raise ValueError(f"{_shown(name)} has no sensible shape, strides or offset")
  last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  # More entries than the storage would be copies of the same: PyTorch's `expand`, which no parameter is.
  if math.prod(shape) and (last >= tensor.storage.size or math.prod(shape) > tensor.storage.size):
    raise ValueError(f"{_shown(name)} of shape {shape} does not fit in its storage of {tensor.storage.size} entries")


def _entries(name: str, storage: Storage, buffer: _Bytes, byteorder: str) -> np.ndarray:
  dtype = storage.dtype
  if len(buffer) != storage.size * dtype.itemsize:
    raise ValueError(f"the storage of {_shown(name)} has {len(buffer)} bytes, not {storage.size} entries {dtype.name}")
  entries = np.frombuffer(buffer, f"u{dtype.itemsize}")  # as integers: NumPy cannot swap the bytes of a bfloat16
  return (entries if byteorder == sys.byteorder else entries.byteswap()).view(dtype)


def _shown(name: str) -> str:
  return name if name.isprintable() and len(name) < 100 else ascii(name)[:100]


__all__ = ["read_torch_file"]
