"""Stopping a run from outside: SIGTERM and SIGINT ask it to save and stop.

Nothing here imports JAX before it is used, so that a program can hear signals from its first instant on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from sapr_jax.errors import InterruptedByUserError, InterruptedRunError
from sapr_jax.runtime.notebook import in_notebook

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED_AT_ONCE = "stopped at once; the same command resumes the run at its last checkpoint"


class Interruption:
  """Turns the first signal into a request that a loop asks for between two steps; a second Ctrl-C stops at once.

      with Interruption() as interruption:
        for batch in batches:
          state = step(state, batch)
          interruption.note_unsaved()
          if interruption.requested():
            save(state)
            interruption.stop()
        save(state)
        interruption.note_saved()

  With several processes the runtime of JAX takes SIGTERM, whichever of them it is sent to, and finds a step at which
  all of them can stop.
  """

  def __init__(self) -> None:
    self._signal: int | None = None
    self._questions = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Interruption:
    import jax

    # Only the main thread may change handlers; in others a run is not interrupted.
    if threading.current_thread() is threading.main_thread():
      signals = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
      self._previous = {number: signal.signal(number, self._note) for number in signals}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    import jax

    if self._signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt(STOPPED_AT_ONCE)
    self._signal = number
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # which JAX takes

  def requested(self) -> bool:
    """Says whether to save and stop now. All processes must ask at the same places, and get the same answer."""
    import jax

    if jax.process_count() == 1:
      return self._signal is not None
    from jax.experimental import multihost_utils

    self._questions += 1
    return bool(multihost_utils.reached_preemption_sync_point(self._questions))

  def stop(self) -> None:
    """Raises `InterruptedRunError`; after Ctrl-C one that is a `KeyboardInterrupt` too."""
    kind = InterruptedByUserError if self._signal == signal.SIGINT else InterruptedRunError
    raise kind(self._message())

  def _message(self) -> str:
    if in_notebook():
      return "stopped by an interrupt, all work saved; run the same cell again to go on"
    name = "a signal" if self._signal is None else signal.Signals(self._signal).name
    return f"stopped by {name}, all work saved; the same command resumes the run"

  def note_unsaved(self) -> None:
    """Notes that there is work that is not saved yet."""

  def note_saved(self) -> None:
    """Notes that all work is saved."""


class ProgramInterruption(Interruption):
  """Interruption of a program that does nothing but a run: it leaves at once while no work is unsaved.

  Python calls handlers of signals between two bytecodes of the main thread, which a compilation holds for minutes.
  Here a thread of its own reads the signals. While there is unsaved work it only notes the first one; otherwise it
  ends the process with status 75, and with 130 at a second Ctrl-C, whatever the main thread is doing. That is safe, as
  files are written such that they survive a kill.
  """

  def __init__(self) -> None:
    super().__init__()
    self._unsaved = False
    # When this process ends at once, a process of `multiprocessing` frees its shared memory, and would warn of that.
    warnings = filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"])
    os.environ["PYTHONWARNINGS"] = ",".join(warnings)
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=self._forget)
    threading.Thread(target=self._read, args=(reader,), daemon=True).start()
    self.listen()

  def listen(self) -> None:
    """Takes the signals, and takes them back from a library that has taken them since."""
    for number in _SIGNALS:
      signal.signal(number, lambda *_: None)  # Python writes its number to the pipe all the same

  def finish(self) -> None:
    """Ignores the signals from now on: the work is done, and Python takes its handlers back as it ends."""
    for number in _SIGNALS:
      signal.signal(number, signal.SIG_IGN)

  def close(self) -> None:
    """Leaves Ctrl-C to Python again, and SIGTERM to the runtime of JAX, which takes it from several processes."""
    signal.set_wakeup_fd(-1)
    os.close(self._writer)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def _forget(self) -> None:
    """Keeps the signals of a forked process out of the pipe, which it shares with this one."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def _read(self, reader: int) -> None:
    while number := os.read(reader, 1):
      self._hear(number[0])

  def _hear(self, number: int) -> None:
    if self._signal is not None and number == signal.SIGINT:
      _leave(130, STOPPED_AT_ONCE)
    self._signal = number
    if not self._unsaved:
      _leave(75, self._message())

  def note_unsaved(self) -> None:
    self._unsaved = True

  def note_saved(self) -> None:
    self._unsaved = False
    if self._signal is not None:  # heard meanwhile
      _leave(75, self._message())


def _leave(status: int, message: str) -> None:
  with contextlib.suppress(OSError):
    os.write(2, f"{message}\n".encode())  # the main thread may hold the lock of sys.stderr
  os._exit(status)
