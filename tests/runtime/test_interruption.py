"""Requests to stop a run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sapr_jax.errors import InterruptedRunError
from sapr_jax.runtime import Interruption


def test_a_signal_is_a_request_that_a_loop_meets():
  before = signal.getsignal(signal.SIGTERM)
  with Interruption() as interruption:
    assert not interruption.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested()
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
      interruption.stop()
  assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_ends_as_a_keyboard_interrupt_that_has_saved():
  with Interruption() as interruption:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT, all work saved") as caught:
      interruption.stop()
  assert isinstance(caught.value, InterruptedRunError)
  with Interruption() as interruption:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError) as caught:
      interruption.stop()
  assert not isinstance(caught.value, KeyboardInterrupt)


def test_a_later_one_starts_afresh():
  with Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
  with Interruption() as later:
    assert not later.requested()


def test_a_second_ctrl_c_stops_at_once():
  with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
    assert interruption.requested()
    signal.raise_signal(signal.SIGINT)


PROGRAM = """
import hashlib, os, signal, sys, time
from sapr_jax.runtime.interruption import ProgramInterruption

interruption = ProgramInterruption()
assert "jax" not in sys.modules  # so that it hears signals from its first instant on
{}
print(flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes without a bytecode, as a compilation
"""
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
  ("work", "signals", "status", "message"),
  [
    ("", [TERM], 75, "stopped by SIGTERM, all work saved; the same command resumes the run"),
    ("", [INT], 75, "stopped by SIGINT, all work saved; the same command resumes the run"),
    ("interruption.note_unsaved()", [INT, INT], 130, "stopped at once; the same command resumes the run at its last"),
    ("interruption.note_unsaved()", [TERM, INT], 130, "stopped at once"),
    (  # noted while there was unsaved work
      "interruption.note_unsaved(); os.kill(os.getpid(), signal.SIGTERM)\n"
      "while not interruption._signal: pass\n"
      "print('saving'); interruption.note_saved()",
      [],
      75,
      "stopped by SIGTERM",
    ),
    (  # a forked process shares the pipe, and has signals of its own
      "child = os.fork()\n"
      "if not child: signal.pause()\n"
      "time.sleep(0.2)\n"
      "os.kill(child, signal.SIGTERM)\n"
      "assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM",
      [INT],
      75,
      "stopped by SIGINT",
    ),
  ],
)
def test_a_program_ends_at_once_unless_it_has_unsaved_work(work, signals, status, message):
  command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM.format(work)]  # of a fork beside threads
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    try:
      process.stdout.readline()
      for number in signals:
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(0.2)  # equal signals that are pending become one
      _, err = process.communicate(timeout=60)
    finally:
      process.kill()
  assert process.returncode == status, err
  assert err.startswith(message) and err.count("\n") == 1
