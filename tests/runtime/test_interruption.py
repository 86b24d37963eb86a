"""Requests to stop, one within another."""

import os
import signal

import pytest

from sapr_jax.errors import InterruptedRunError
from sapr_jax.runtime.interruption import Interruption


def test_a_run_has_the_request_that_came_before_it_began():
  with Interruption() as outer:
    os.kill(os.getpid(), signal.SIGTERM)
    with Interruption() as inner:
      assert inner.requested()
      with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        inner.stop()
    assert outer.requested()


def test_a_request_that_came_when_the_run_was_about_to_end_reaches_the_program():
  with Interruption() as outer:
    with Interruption():
      os.kill(os.getpid(), signal.SIGTERM)
    assert outer.requested()
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
      outer.stop()


def test_a_later_one_starts_afresh():
  with Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
  with Interruption() as later:
    assert not later.requested()
