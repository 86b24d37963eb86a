"""The command for accelerators: its pieces with scripts in their place, and all of it at its smallest sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import accelerator, performance_page

# The command forks, where no JAX runs; here some does, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")

ROOT = pathlib.Path(__file__).parents[2]
ABACUS = {"platform": "gpu", "device": "abacus", "versions": {"jax": "1"}, "cpu": "any"}


@dataclasses.dataclass(frozen=True)
class Script(accelerator.Piece):
  """A piece that is a line of shell."""

  script: str = "true"

  def command(self, out, tiny):
    return ["sh", "-c", f"echo {self.name} >>{out}/calls; {self.script}"]


@pytest.fixture
def call(tmp_path, monkeypatch):
  """Runs the command on pieces; returns its exit status, the outcome of each, and which were started."""
  monkeypatch.setattr(accelerator, "section", lambda *_: "- Goal reached: all.\n- a table")
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  def run(pieces, *options, about=ABACUS):
    monkeypatch.setattr(accelerator, "find_machine", lambda: about)
    monkeypatch.setattr(sys, "argv", ["accelerator", "--out", str(tmp_path), *options])
    (tmp_path / "calls").write_text("")
    try:
      status = accelerator.main(pieces)
    except SystemExit as error:
      status = error.code
    outcomes, file = {}, tmp_path / f"accelerator_{about['platform']}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      outcomes = json.loads(file.read_text())["outcomes"]
    return status, outcomes, (tmp_path / "calls").read_text().split()

  yield run
  for number, handler in handlers.items():
    signal.signal(number, handler)


def test_each_piece_ends_in_its_own_way_and_stops_no_other(call, capsys):
  traceback = "Traceback (most recent call last):\n  File\njaxlib.Died: no\nValueError: 3 is too many\nwarning: leaked"
  pieces = [
    Script("bad", "a", script=f"echo '{traceback}' >&2; exit 1"),
    Script("slow", "a", minutes=0.1 / 60, script="sleep 60"),
    Script("absent", "a", packages=("sys", "no_such_module")),
    Script("late", "a", script=f"{sys.executable} -S -c 'import no_such_module'"),
    Script("killed", "a", script="kill -KILL $$"),
    Script("good", "a", script="echo 'note: without PyTorch' >&2; echo '| table |'; echo talk"),
  ]
  start = time.monotonic()
  status, outcomes, _ = call(pieces)
  assert status == 1 and time.monotonic() - start < 30
  assert {name: found["outcome"] for name, found in outcomes.items()} == {
    "bad/a": "failed",
    "slow/a": "out of time",
    "absent/a": "left out",
    "late/a": "left out",
    "killed/a": "failed",
    "good/a": "done",
  }
  assert outcomes["bad/a"]["notes"] == ["ValueError: 3 is too many"]
  assert outcomes["killed/a"]["notes"] == ["ended by SIGKILL"]
  assert outcomes["absent/a"]["notes"] == outcomes["late/a"]["notes"] == ["no_such_module missing"]
  assert outcomes["good/a"]["notes"] == ["without PyTorch"]
  out = capsys.readouterr().out
  assert "| table |" in out and "talk" not in out
  assert "| good/a | done in 0 s; without PyTorch |" in out and out.endswith("- Goal reached: all.\n")


def test_the_same_command_goes_on_with_what_was_never_tried_and_then_with_what_failed(call):
  bad, good, new = (
    Script(name, "a", script=f"exit {status}") for name, status in (("bad", 1), ("good", 0), ("new", 0))
  )
  assert call([bad, good])[0] == 1
  status, outcomes, started = call([bad, good, new])
  assert (status, started) == (1, ["new/a", "bad/a"])
  assert outcomes["bad/a"]["tries"] == 2
  status, outcomes, started = call([dataclasses.replace(bad, script="true"), good, new])
  assert (status, started) == (0, ["bad/a"]) and outcomes["bad/a"]["outcome"] == "done"
  assert call([bad, good, new])[::2] == (0, [])
  assert call([bad, good, new], "--only", "good", "new/a")[::2] == (0, ["good/a", "new/a"])


def test_a_call_without_time_says_that_it_is_to_go_on(call):
  first, last = Script("first", "a"), Script("last", "a", script="sleep 60")
  status, outcomes, started = call([first, last], "--minutes", f"{4 / 60}")  # too little for the last to begin
  assert (status, started, list(outcomes)) == (75, ["first/a"], ["first/a"])
  short = dataclasses.replace(last, minutes=8 / 60)
  other = dataclasses.replace(first, benchmark="other")
  status, outcomes, started = call([first, other, short], "--minutes", f"{4 / 60}")
  assert (status, started, list(outcomes)) == (75, ["other/a", "last/a"], ["first/a", "other/a"])  # it was cut short
  status, outcomes, started = call([first, other, short], "--minutes", f"{0.2 / 60}")
  assert (status, started) == (75, ["last/a"]) and outcomes["last/a"]["outcome"] == "cut short"  # it was the first
  assert "give more --minutes" in outcomes["last/a"]["notes"][0]
  status, outcomes, started = call([first, other, dataclasses.replace(short, script="true")])
  assert (status, started) == (0, ["last/a"]) and outcomes["last/a"]["tries"] == 2


@pytest.mark.parametrize("minutes", ["-1", "0", "nan", "inf"])
def test_minutes_are_a_positive_number(minutes, call, capsys):
  assert call([Script("any", "a")], f"--minutes={minutes}")[::2] == (2, [])
  assert f"error: --minutes must be a positive number, got {minutes}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"x": 1}', '{"machine": {}, "tiny": false, "outcomes": {"any/a": {}}}']
)
def test_a_record_that_is_none_is_refused_and_kept(text, call, tmp_path):
  file = tmp_path / "accelerator_gpu.json"
  file.write_text(text)
  status, _, started = call([Script("any", "a")])
  assert status == f"error: {file} is damaged or of something else; move it away, or give another --out"
  assert not started and file.read_text() == text


def test_a_place_that_cannot_be_written_is_named(call, tmp_path, capsys):
  (tmp_path / "file").write_text("kept")
  for place in ("file", "file/folder"):
    status, _, started = call([Script("any", "a")], "--out", str(tmp_path / place))
    assert status.startswith(f"error: {tmp_path / place} cannot be used (") and "\n" not in status and not started
  assert (tmp_path / "file").read_text() == "kept"
  (tmp_path / "accelerator_gpu.log").mkdir()
  status, _, started = call([Script("any", "a")])
  assert status.startswith(f"error: {tmp_path / 'accelerator_gpu.log'} cannot be used (") and not started


def test_without_goals_the_table_is_the_end(call, capsys, monkeypatch):
  monkeypatch.setattr(accelerator, "section", lambda *_: "")
  call([Script("any", "a")])
  assert capsys.readouterr().out.endswith("| any/a | done in 0 s |\n")


def test_a_signal_ends_the_piece_and_the_next_call_begins_with_it(call, tmp_path):
  first, last = Script("first", "a"), Script("last", "a", script=f"echo $$ >{tmp_path}/id; kill -TERM $PPID; sleep 60")
  status, outcomes, _ = call([first, last])
  assert status == 75 and list(outcomes) == ["first/a"]
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "id").read_text()), 0)
  assert call([first, dataclasses.replace(last, script="true")])[::2] == (0, ["last/a"])


def test_another_device_or_release_is_named_and_nothing_is_mixed(call):
  piece = Script("any", "a", tiny=True)
  assert call([piece])[0] == 0
  for change, shown in (
    ({"device": "slide rule"}, "device abacus, here slide rule"),
    ({"versions": {"jax": "2"}}, "versions {'jax': '1'}, here {'jax': '2'}"),
  ):
    message, _, started = call([piece], "--only", "any", about=ABACUS | change)
    assert shown in message and message.count("\n") == 0 and not started
  assert "tiny False, here True" in call([piece], "--tiny")[0]
  assert call([piece], "--only", "any", about=ABACUS | {"cpu": "another"})[::2] == (0, ["any/a"])


@pytest.mark.parametrize(
  ("options", "message"),
  [([], "no accelerator"), (["--only", "nothing"], "PIECE must be one of any/a, got nothing")],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, message, call, capsys):
  status = call([Script("any", "a")], *options, about=ABACUS | {"platform": "cpu"})[0]
  assert message in f"{status}{capsys.readouterr().err}"


def test_a_rehearsal_is_kept_out_of_results(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["accelerator", "--tiny", "--out", "results"])
  with pytest.raises(SystemExit):
    accelerator.main()
  assert "name another folder" in capsys.readouterr().err


def test_every_piece_is_a_row_of_its_benchmark():
  for piece in accelerator.PIECES:
    benchmark = importlib.import_module(f"benchmarks.{piece.benchmark}")
    rows = benchmark.ROWS if hasattr(benchmark, "ROWS") else {network.name for network in benchmark.NETWORKS}
    assert piece.row in rows
  assert len({piece.name for piece in accelerator.PIECES}) == len(accelerator.PIECES)


@pytest.mark.slow
def test_all_of_it_at_its_smallest_sizes(tmp_path):
  for package in ("grain", "cv2"):
    pytest.importorskip(package, reason="streaming needs pip install 'sapr_jax[imagenet]'")
  command = [sys.executable, "-m", "benchmarks.accelerator", "--out", str(tmp_path), "--tiny", "--minutes", "30"]
  # One thread, as those of PyTorch wait for each other at work; most of the time goes to compiling.
  environment = {
    "OMP_NUM_THREADS": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XDG_CACHE_HOME": str(tmp_path / "cache"),
  }
  how = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
  ended = subprocess.run(command, **how)
  assert ended.returncode == 0, ended.stdout + (tmp_path / "accelerator_cpu.log").read_text()
  pieces, has_torch = [p for p in accelerator.PIECES if p.tiny], importlib.util.find_spec("torch") is not None
  assert {piece.benchmark for piece in pieces} == {piece.benchmark for piece in accelerator.PIECES}
  outcomes = json.loads((tmp_path / "accelerator_cpu.json").read_text())["outcomes"]
  assert list(outcomes) == [piece.name for piece in pieces]
  for piece in pieces:
    found = outcomes[piece.name]
    assert found["outcome"] == "done"
    assert not (has_torch and "without PyTorch" in str(found))
    page = performance_page.section(piece.benchmark, tmp_path)
    assert page.startswith(f"### CPU\n\n`python -m benchmarks.{piece.benchmark}`") and "|---|" in page
  log = (tmp_path / "accelerator_cpu.log").read_text()
  assert subprocess.run(command, **how).returncode == 0
  assert (tmp_path / "accelerator_cpu.log").read_text() == log  # nothing was left to measure
