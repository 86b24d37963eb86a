"""Requests to stop a run."""

import os
import signal

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
