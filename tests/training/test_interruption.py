"""Requests to stop, one within another."""

import os
import signal

import pytest

from sapr_jax.errors import InterruptedRunError
from sapr_jax.training.interruption import Interruption


def test_a_run_has_the_request_that_came_before_it_began():
  with Interruption() as outer:
    os.kill(os.getpid(), signal.SIGTERM)
    with Interruption() as inner:
      assert inner.requested()
      with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        inner.stop()
    assert outer.requested()


def test_a_later_one_starts_afresh():
  with Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
  with Interruption() as later:
    assert not later.requested()
