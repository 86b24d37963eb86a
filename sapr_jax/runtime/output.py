"""Output of a program that goes on when nobody reads it."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def survive_lost_output() -> None:
  """Lets this program go on when its output cannot be written: a closed pipe or descriptor, a full disk.

  It is for programs, and not for libraries, as it replaces `sys.stdout` and `sys.stderr`.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # closed: a file of the run would get its number, and then what C++ prints
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
  for number, name in ((1, "stdout"), (2, "stderr")):
    encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
    lines = io.BufferedWriter(_Output(number, "w", closefd=False))
    setattr(sys, name, io.TextIOWrapper(lines, encoding, errors="backslashreplace", line_buffering=True))


class _Output(io.FileIO):
  """A descriptor that becomes /dev/null, for all who write to it, when a write fails."""

  def write(self, data: Any, /) -> int:
    try:
      written = super().write(data)
    except OSError:
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self.fileno())
      os.close(null)
      written = None
    return memoryview(data).nbytes if written is None else written  # None too if a reader without blocking is slow
