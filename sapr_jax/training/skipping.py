"""Broken images that a run goes on without, as `data.skip_broken` allows: named once, counted, and kept on disk."""

from __future__ import annotations

import json
import pathlib
import sys

from sapr_jax.artifacts.files import read_bytes, write_atomically, write_through
from sapr_jax.data import too_many_broken


class SkippedImages:
  """Broken images that were met so far.

  What is used in their place depends on the files alone, so that every start skips the same ones. Only their number
  has to be remembered: a run that had met too many must not go on when it is started again. Each process counts those
  that it reads.
  """

  def __init__(self, limit: int):
    self._limit, self._known = limit, dict[tuple[str, int], str]()
    self._file: pathlib.Path | None = None

  def keep_in(self, file: pathlib.Path) -> None:
    """Recalls those that earlier starts wrote to `file`, one JSON array a line, and adds to it from now on."""
    self._file = file
    if not file.exists():
      return
    for line in read_bytes(file).split(b"\n"):
      try:
        split, index, problem = json.loads(line)
        self._known[str(split), int(index)] = str(problem)
      except (OverflowError, RecursionError, TypeError, ValueError):
        pass  # half of a line, after a kill
    write_atomically(file, _lines(self._known))
    self._check()
    if self._known:
      print(f"warning: {len(self._known)} broken images are skipped, which {file} names", file=sys.stderr)

  def add(self, split: str, broken: dict[int, str]) -> None:
    """Notes broken images of a split, each with what is wrong with it.

    Raises:
      InputError: If they are too many.
    """
    new = {(split, index): problem for index, problem in broken.items() if (split, index) not in self._known}
    self._known |= new
    for problem in new.values():
      print(f"warning: skipped, as data.skip_broken={self._limit} allows: {problem}", file=sys.stderr)
    if new and self._file is not None:
      with self._file.open("ab") as file:
        write_through(file, _lines(new))
    self._check()

  def _check(self) -> None:
    if len(self._known) > self._limit:
      raise too_many_broken(self._known.values(), self._limit)


def _lines(broken: dict[tuple[str, int], str]) -> str:
  return "".join(f"{json.dumps([*place, problem])}\n" for place, problem in broken.items())
