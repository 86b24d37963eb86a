"""Stopping a run from outside: SIGTERM and SIGINT ask it to save and stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

from sapr_jax.errors import InterruptedRunError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
  """Turns the first signal into a request that a loop asks for between two steps; a second Ctrl-C stops at once.

      with Interruption() as interruption:
        for batch in batches:
          state = step(state, batch)
          if interruption.requested():
            save(state)
            interruption.stop()

  With several processes the runtime of JAX takes SIGTERM, whichever of them it is sent to, and finds a step at which
  all of them can stop.
  """

  def __init__(self) -> None:
    self._signal: int | None = None
    self._questions = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Interruption:
    # Only the main thread may change handlers; elsewhere (some notebooks) Ctrl-C acts as it always does.
    if threading.current_thread() is threading.main_thread():
      signals = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
      self._previous = {number: signal.signal(number, self._note) for number in signals}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self._signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._signal = number
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # which JAX takes

  def requested(self) -> bool:
    """Says whether to save and stop now. All processes must ask at the same places, and get the same answer."""
    if jax.process_count() == 1:
      return self._signal is not None
    from jax.experimental import multihost_utils

    self._questions += 1
    return bool(multihost_utils.reached_preemption_sync_point(self._questions))

  def stop(self) -> None:
    """Raises `InterruptedRunError`."""
    name = "a signal" if self._signal is None else signal.Signals(self._signal).name
    raise InterruptedRunError(f"stopped by {name}, all work saved; the same command resumes the run")
