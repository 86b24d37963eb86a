"""What a run says of how far it is."""

from __future__ import annotations

import io
import signal
import sys
import types

import pytest

from sapr_jax.runtime import Interruption, Progress, progress
from sapr_jax.runtime.notebook import in_notebook


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves on."""
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  return now


def test_the_time_left_is_that_of_the_last_epochs(clock, capsys):
  shown = Progress("train", epochs=20, steps_per_epoch=10, steps_done=0)

  def epoch(seconds):
    for _ in range(10):
      clock[0] += seconds / 10
      shown.advance(1)
    shown.line("line")
    return capsys.readouterr().out.strip()

  clock[0] = 50.0  # the first step waits for the compiler, which must not count
  assert epoch(10.0) == "line; 3 min 10 s left"
  assert epoch(10.0) == "line; 3 min 0 s left"
  for _ in range(5):
    epoch(30.0)
  assert epoch(30.0) == "line; 6 min 0 s left"  # of 12 epochs
  for _ in range(11):
    epoch(1.0)
  assert epoch(1.0) == "line"


def test_a_long_epoch_says_where_it_is(clock, capsys):
  shown = Progress("train", epochs=2, steps_per_epoch=10, steps_done=0)
  shown.advance(1)
  clock[0] = 61.0
  shown.advance(1)
  assert capsys.readouterr().out == "train 1/2: step 2 of 10; 18 min 18 s left\n"


@pytest.fixture
def kernel(monkeypatch):
  """Makes this process look like the kernel of a notebook."""
  shell = types.SimpleNamespace(kernel=object())
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_a_notebook_has_a_bar_and_is_told_how_to_go_on(kernel, monkeypatch, capsys):
  import tqdm.auto

  bars = []

  class Bar:
    def __init__(self, **options):
      bars.append(options)

    def update(self, steps):
      bars.append(steps)

    def close(self):
      bars.append("closed")

  assert in_notebook()
  monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
  shown = Progress("train", epochs=2, steps_per_epoch=10, steps_done=4)
  shown.advance(2)
  shown.line("an epoch")
  shown.close()
  options, *rest = bars
  assert (options["total"], options["initial"], options["disable"]) == (20, 4, False)
  assert rest == [2, "closed"] and capsys.readouterr().out == "an epoch\n"  # the bar has the time left

  with (
    Interruption() as interruption,
    pytest.raises(KeyboardInterrupt, match="saved; run the same cell again"),
  ):
    signal.raise_signal(signal.SIGINT)
    interruption.stop()
