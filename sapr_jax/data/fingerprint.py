"""Fingerprints of data sets: whether two runs, or two starts of one, see the same images."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from sapr_jax.data.dataset import EncodedDataset, ImageDataset

_SAMPLED = 64  # of each split: enough for another set or another version of it, and read in a second from a slow disk


def fingerprint(dataset: ImageDataset | EncodedDataset) -> dict[str, Any]:
  """Returns what tells data sets apart, each value under its name in words, as JSON can hold it.

  Of images in memory it covers every pixel and label. Of files to stream it covers all of their names and labels, where
  these are known without reading them, and the contents of a few: a single file that changes may go unnoticed.
  """
  found: dict[str, Any] = {
    "the number of images": [len(dataset.train), len(dataset.test)],
    "the number of classes": len(dataset.class_names),
    "the checksum of the class names": _checksum(name.encode(errors="surrogateescape") for name in dataset.class_names),
  }
  if isinstance(dataset, ImageDataset):
    arrays = [(split.labels, np.ascontiguousarray(split.images)) for split in (dataset.train, dataset.test)]
    found["the shape of the images"] = list(dataset.image_shape)
    found["the checksum of the labels"] = _checksum(labels.data for labels, _ in arrays)
    found["the checksum of the images"] = _checksum(images.data for _, images in arrays)
    return found
  contents = []
  for split in (dataset.train, dataset.test):
    for index in np.linspace(0, len(split) - 1, min(_SAMPLED, len(split)), dtype=int).tolist():
      encoded, label, _ = split[index]
      contents += [encoded, b"%d" % label]
  found["the checksum of the file names and labels"] = _checksum(s.listing() for s in (dataset.train, dataset.test))
  found[f"the checksum of {len(contents) // 2} of the files"] = _checksum(contents)
  return found


def _checksum(parts: Iterable[bytes | memoryview]) -> str:
  checksum = 0
  for part in parts:
    checksum = zlib.crc32(b"\0", zlib.crc32(part, checksum))  # and where it ends
  return f"{checksum:08x}"
