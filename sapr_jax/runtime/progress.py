"""Progress of a run: a bar with the time left on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import collections
import contextlib
import sys
import time

from sapr_jax.runtime.devices import is_main_process
from sapr_jax.runtime.notebook import in_notebook

HEARTBEAT_SECONDS = 60.0
_RECENT_LINES = 5
"""From so many lines the time left is estimated, as epochs with a search take longer than those before it."""


def say(text: str) -> None:
  """Prints `text`, on one process only, if it can be printed."""
  if is_main_process():
    with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a full disk, a file that was closed
      print(text, flush=True)


class Progress:
  """Shows the progress of one stage.

  On a terminal and in a notebook, a bar counts steps. In a log file, every epoch has its line (through `line`), and an
  epoch that takes long says every minute where it is.
  """

  def __init__(self, stage: str, epochs: int, steps_per_epoch: int, steps_done: int):
    self._stage, self._epochs, self._steps_per_epoch = stage, epochs, steps_per_epoch
    self._done, self._last_line = steps_done, time.monotonic()
    self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RECENT_LINES + 1)
    self._lines = 0
    self._is_terminal = sys.stderr.isatty() and is_main_process() and not in_notebook()
    self._has_bar = is_main_process() and (self._is_terminal or in_notebook())
    if in_notebook():
      from tqdm.auto import tqdm  # a widget, if ipywidgets is installed
    else:
      from tqdm import tqdm
    total = epochs * steps_per_epoch
    self._bar = tqdm(
      total=total, initial=steps_done, desc=stage, unit="step", disable=not self._has_bar, dynamic_ncols=True
    )

  def advance(self, steps: int) -> None:
    """Notes that `steps` more weight steps are done."""
    self._done += steps
    self._bar.update(steps)
    now = time.monotonic()
    if not self._times:  # from here on, as the first call waits for the compiler
      self._times.append((now, self._done))
    if not self._has_bar and now - self._last_line > HEARTBEAT_SECONDS:
      epoch, step = divmod(self._done, self._steps_per_epoch)
      self.say(f"{self._stage} {epoch + 1}/{self._epochs}: step {step} of {self._steps_per_epoch}{self._left(now)}")

  def line(self, text: str) -> None:
    """Prints the line of an epoch, with the time left unless the bar shows it."""
    now = time.monotonic()
    self.say(text if self._has_bar else f"{text}{self._left(now)}")
    self._lines += 1
    if self._lines == 1:  # the first evaluation too was compiled
      self._times.clear()
    self._times.append((now, self._done))

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    self._last_line = time.monotonic()
    if self._is_terminal:
      self._bar.write(text, file=sys.stdout)
    else:
      say(text)

  def _left(self, now: float) -> str:
    """Returns the time left in words; nothing at the end, and before it can be known."""
    todo = self._epochs * self._steps_per_epoch - self._done
    started, first = self._times[0] if self._times else (now, self._done)
    if not todo or self._done == first:
      return ""
    return f"; {duration((now - started) / (self._done - first) * todo)} left"

  def close(self) -> None:
    self._bar.close()


def duration(seconds: float) -> str:
  """Returns a duration as one says it.

  >>> duration(7.4), duration(142), duration(12_000)
  ('7 s', '2 min 22 s', '3 h 20 min')
  """
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole // 60 % 60} min"
