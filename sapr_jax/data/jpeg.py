"""JPEG files: decoding with libjpeg-turbo, and whether all pixels are there.

libjpeg makes up the pixels that it misses, and at most warns. simplejpeg passes on the first of its warnings.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import simplejpeg

# Beginnings of the warnings that mean lost pixels. Of the others, those about the header are not met here, and "Invalid
# SOS parameters" says that an encoder was careless.
_LOSS = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")
# Bytes that are left over after the last pixel: some encoders write such.
_STRAY = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
# As zeros are the shortest code, a block of 64 coefficients that are all -1 is the most that so many can be with the
# tables of most files, and no image has such blocks. It is also more than the zeros in a table.
_HOLE = bytes(24)

_START, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_TABLES = 0xC4  # markers, as all below
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_TABLES, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SEQUENTIAL = _FRAMES - _PROGRESSIVE
_NO_SEGMENTS = frozenset(range(0xD0, 0xDA))
_WITHOUT_PIXELS = frozenset({*range(0xE0, 0xF0), 0xFE})  # Exif, colour profiles, comments
_END_OF_BLOCK = 0  # symbol of a Huffman code

Segments = list[tuple[int, bytes]]
"""Parts of a header, each with its marker."""


class MissingPixelsError(ValueError):
  """A file that lacks some of its pixels; the message says how that shows."""


def is_jpeg(encoded: bytes) -> bool:
  """Whether a file is a JPEG, by its first bytes."""
  return encoded[:2] == _START


def read_header(encoded: bytes) -> tuple[int, int, str] | None:
  """Returns height, width and colour space ("YCbCr", "RGB", "Gray", ...); None if libjpeg-turbo cannot tell."""
  if not is_jpeg(encoded):
    return None
  try:
    height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded)
  except ValueError:
    return None
  return int(height), int(width), colourspace


def decode(encoded: bytes, **options: Any) -> np.ndarray | None:
  """Decodes a JPEG to uint8 `[H, W, 3]`; None if that is left to Pillow, which forgives oddities.

  Args:
    encoded: The file.
    options: See `simplejpeg.decode_jpeg`. Without any, the pixels are those of Pillow, where it has libjpeg-turbo too.

  Raises:
    MissingPixelsError: If pixels are missing.
  """
  try:
    pixels = simplejpeg.decode_jpeg(encoded, **options)
  except ValueError:
    pixels = None
  header, place = _read_segments(encoded)
  if pixels is None or encoded.find(_HOLE, place) >= 0 or not _has_one_scan(header, encoded[place : place + 5]):
    _check_scans(header, _cut_scans(encoded, place), decodes=pixels is not None)
  return pixels


def _check_scans(header: Segments, scans: bytes, *, decodes: bool) -> None:
  """Raises `MissingPixelsError` if pixels are missing; `decodes` says that libjpeg has nothing to warn of."""
  has_stray = False
  if not decodes:
    # Without what is of no matter to the pixels, so that a warning about it does not hide a later one.
    start = _START + b"".join(segment for _, segment in header)
    warning = _warning(start + scans)
    if found := _STRAY.match(warning):
      has_stray, scans = True, scans[: -len(_END) - int(found[1])] + _END
      warning = _STRAY.sub("", _warning(start + scans))  # the decoder had read a few of them ahead
    if warning.startswith(_LOSS):
      raise MissingPixelsError(warning)
  if not _has_all_scans(header, scans):
    raise MissingPixelsError("it ends before the last scan")
  if _HOLE in scans and (has_stray or not _zeros_may_be_image(header, scans)):
    raise MissingPixelsError("it has a hole of zeros")


def _warning(encoded: bytes) -> str:
  """Returns libjpeg's first warning, or its error; empty if there is none."""
  try:
    simplejpeg.decode_jpeg(encoded)
  except ValueError as error:
    return str(error)
  return ""


def _read_segments(encoded: bytes) -> tuple[Segments, int]:
  """Returns the segments of the header that matter to the pixels, and where the first scan begins."""
  header: Segments = []
  place = len(_START)
  while (place := encoded.find(b"\xff", place)) >= 0 and place + 4 <= len(encoded):
    marker = encoded[place + 1]
    if marker == _SCAN[1]:
      return header, place
    if marker < 0xC0 or marker == 0xFF or marker in _NO_SEGMENTS:  # stray bytes or padding
      place += 1
      continue
    end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    if marker not in _WITHOUT_PIXELS:
      header.append((marker, encoded[place:end]))
    place = end
  return header, len(encoded)


def _cut_scans(encoded: bytes, place: int) -> bytes:
  """Returns the scans up to the end marker, behind which there may be anything."""
  end = encoded.find(_END, place)
  return encoded[place : end + len(_END) if end >= 0 else len(encoded)]


def _has_one_scan(header: Segments, scan: bytes) -> bool:
  """Whether the first scan has all channels to the last bit."""
  return any(segment[9:10] == scan[4:5] for marker, segment in header if marker in _SEQUENTIAL)


def _has_all_scans(header: Segments, scans: bytes) -> bool:
  """Whether every coefficient of every channel is there to its last bit, by the headers of the scans."""
  frames = [(marker, segment) for marker, segment in header if marker in _FRAMES and len(segment) > 9]
  if len(frames) != 1:
    return True  # nothing that decodes
  marker, frame = frames[0]
  missing = {channel: set(range(64)) for channel in frame[10 : 10 + 3 * frame[9] : 3]}
  place = 0
  while (place := scans.find(_SCAN, place)) >= 0 and place + 5 < len(scans):
    channels, rest = scans[place + 5 : place + 5 + 2 * scans[place + 4]], scans[place + 5 + 2 * scans[place + 4] :][:3]
    first, last, bits = rest if marker in _PROGRESSIVE and len(rest) == 3 else (0, 63, 0)
    for channel in channels[::2]:
      if channel in missing and not bits & 0xF:
        missing[channel] -= set(range(first, last + 1))
    place += len(_SCAN)
  return not any(missing.values())


def _zeros_may_be_image(header: Segments, scans: bytes) -> bool:
  """Whether long runs of zeros may stand for pixels, such as a flat background.

  In a scan of all channels they may if the first and thus shortest code, which is zeros alone, ends a block in every
  table. In scans of single bits and channels they always may.
  """
  if any(marker in _PROGRESSIVE for marker, _ in header) or scans.find(_SCAN, 2) >= 0:
    return True
  for marker, segment in header:
    place = 4
    while marker == _TABLES and place + 17 < len(segment):
      is_of_blocks, first_symbol = segment[place] >> 4, segment[place + 17]
      if is_of_blocks and first_symbol != _END_OF_BLOCK:
        return False
      place += 17 + sum(segment[place + 1 : place + 17])
  return True
