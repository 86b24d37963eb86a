"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

from sapr_jax.runtime.devices import is_main_process

HEARTBEAT_SECONDS = 60.0


def say(text: str) -> None:
  """Prints `text`, on one process only, if it can be printed."""
  if is_main_process():
    with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a full disk, a file that was closed
      print(text, flush=True)


class Progress:
  """Shows the progress of one stage.

  On a terminal, a bar counts steps. In a log file, every epoch has its line (through `line`), and an epoch that takes
  long says every minute where it is.
  """

  def __init__(self, stage: str, epochs: int, steps_per_epoch: int, steps_done: int):
    self._stage, self._epochs, self._steps_per_epoch = stage, epochs, steps_per_epoch
    self._done = self._first = steps_done
    self._started = self._last_line = time.monotonic()
    self._is_terminal = sys.stderr.isatty() and is_main_process()
    total, hidden = epochs * steps_per_epoch, not self._is_terminal
    self._bar = tqdm(total=total, initial=steps_done, desc=stage, unit="step", disable=hidden, dynamic_ncols=True)

  def advance(self, steps: int) -> None:
    """Notes that `steps` more weight steps are done."""
    self._done += steps
    self._bar.update(steps)
    now = time.monotonic()
    if not self._is_terminal and now - self._last_line > HEARTBEAT_SECONDS:
      epoch, step = divmod(self._done, self._steps_per_epoch)
      self.line(f"{self._stage} epoch {epoch + 1}/{self._epochs}: step {step}/{self._steps_per_epoch}")

  def line(self, text: str) -> None:
    """Prints a line, with the time left unless the bar shows it."""
    self._last_line = time.monotonic()
    if self._is_terminal:
      self._bar.write(text, file=sys.stdout)
      return
    done, todo = self._done - self._first, self._epochs * self._steps_per_epoch - self._done
    if done and todo:
      seconds = round((self._last_line - self._started) / done * todo)
      text += f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
    say(text)

  def close(self) -> None:
    self._bar.close()
