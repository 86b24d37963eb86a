"""What a command found out: as facts for scripts, and as text for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer.

  Attributes:
    facts: As JSON data.
    text: For people, without the last line break.
  """

  facts: dict[str, Any]
  text: str


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
  """Returns rows, of which the first is the head, with their columns side by side; `numbers` are set to the right.

  Example:
    >>> print(table([["layer", "width"], ["conv1", "16"], ["fc", "8"]], numbers=[1]))
    layer  width
    ------------
    conv1     16
    fc         8
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.rjust(width) if place in numbers else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return "\n".join(
    [lines[0].rstrip(), "-" * (sum(widths) + 2 * len(widths) - 2), *(line.rstrip() for line in lines[1:])]
  )


def size_of(count: float) -> str:
  """Returns a number of bytes in words.

  Example:
    >>> size_of(900), size_of(126136)
    ('900 B', '123.2 KiB')
  """
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} GiB"


def accuracy_of(metrics: Any) -> str:
  """Returns a measured accuracy in words; "" if there is none.

  Example:
    >>> accuracy_of({"accuracy": 0.98, "images": 600})
    '98.00 % of 600 images'
  """
  accuracy, images = metrics.get("accuracy"), metrics.get("images")
  if not isinstance(accuracy, int | float):
    return ""
  return f"{accuracy:.2%}".replace("%", " %") + (f" of {images:,} images" if isinstance(images, int) else "")
