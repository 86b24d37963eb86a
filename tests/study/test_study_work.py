"""In what order and beside whom jobs are run, how they are stopped, and what the command says."""

from __future__ import annotations

import os
import re
import signal

import pytest
from entries import entry

import sapr_jax as sapr
from sapr_jax.artifacts.files import write_json
from sapr_jax.errors import DivergedError
from study import __main__ as command, work
from study.records import is_finished
from study.rows import chosen, grid, job_of
from study.sizes import SIZES


def jobs_of(names, folder):
  return [job_of(row, seed, folder, None, {}) for row, seed in chosen(grid(SIZES["reduced"]), names, [0])]


def finish(job):
  job.workdir.mkdir(parents=True)
  write_json(job.workdir / "study.json", entry(job.row.name, job.seed))


def test_a_run_that_cannot_be_done_does_not_keep_the_others_from_it(tmp_path, monkeypatch, capsys):
  def run(job):
    if job.row.name == "gamma=0":
      raise DivergedError("training diverged.")
    finish(job)

  monkeypatch.setattr(work, "_runner", lambda kind: run)
  monkeypatch.setattr(work, "write_entry", lambda job: None)
  jobs = jobs_of(["uniform_width", "one_shot_l1=global"], tmp_path)
  left, failed = work.run_all(jobs, lambda: None)
  assert [job.row.name for job in left] == ["one_shot_l1=global"] and [job.row.name for job in failed] == ["gamma=0"]
  assert {job.row.name for job in jobs if is_finished(job.workdir)} == {"uniform_width"}
  assert "error: resnet20/gamma=0, seed 0: training diverged.\n" in capsys.readouterr().err


def test_what_another_process_has_is_left_to_it(tmp_path, monkeypatch):
  monkeypatch.setattr(work, "_runner", lambda kind: finish)
  monkeypatch.setattr(work, "write_entry", lambda job: None)
  jobs = jobs_of(["uniform_width", "one_shot_l1=global"], tmp_path)
  with work.lock(jobs[0].workdir):
    left, _ = work.run_all(jobs, lambda: None)
  assert [job.row.name for job in left] == ["gamma=0", "one_shot_l1=global"]
  assert work.run_all(jobs, lambda: None) == ([], [])


def test_what_stops_two_runs_alike_stops_all(tmp_path, monkeypatch):
  def run(job):
    raise sapr.InputError("no images.")

  monkeypatch.setattr(work, "_runner", lambda kind: run)
  with pytest.raises(sapr.InputError, match="no images"):
    work.run_all(jobs_of(["gamma=0", "gamma=0.02", "uniform_width"], tmp_path), lambda: None)


@pytest.mark.parametrize("minutes", [None, 1e-4])
def test_a_signal_or_the_end_of_the_time_stops_between_two_runs(minutes):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt), work.stoppable(minutes):
    if minutes is None:
      os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
  assert signal.getsignal(signal.SIGTERM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_list_says_what_is_left_and_how_long_it_takes_by_the_records(capsys, monkeypatch, tmp_path):
  rows = [
    {"network": "resnet20", "row": "gamma=0", "seed": seed, "seconds": {"total": 3600.0 * seed}} for seed in (1, 2, 3)
  ]
  write_json(tmp_path / "cifar10_study_reduced.json", {"rows": rows})
  arguments = ["--rows", "gamma=0", "uniform_width", "--seeds", "0", "--results", str(tmp_path), "--list"]
  monkeypatch.setattr("sys.argv", ["study", "--size", "reduced", *arguments])
  assert command.main() == 0
  assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
    ["to", "do", "7,200", "s", "resnet20/gamma=0,", "seed", "0"],
    ["to", "do", "resnet20/uniform_width,", "seed", "0"],
    ["2", "to", "do:", "2.0", "hours", "for", "1", "of", "them,", "1", "not", "recorded."],
  ]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--runs is missing; name a folder for the work directories."),
    (["--runs", __file__], rf"{__file__}/reduced cannot be used \(Not a directory\); what is on disk .*"),
    (["--runs", "{folder}", "--minutes", "inf"], "--minutes inf is out of range; expected a number above 0, .*"),
    (
      ["--runs", "{folder}", "--data", "{folder}"],
      r"--data \S+ holds no train/<class>/\* files; give the folder above.*",
    ),
    (["--runs", "{folder}", "--set", "train.batch_size=0"], r"train.batch_size must be .*, got 0.*"),
    (["--runs", "{folder}", "--set", "eval={[]: 1}"], r"--set eval={\[\]: 1}: configs/default.py has no such field.*"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
  given = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
  monkeypatch.setattr(work, "_run", lambda job: pytest.fail("it ran"))
  results = ["--results", str(tmp_path / "results")]
  monkeypatch.setattr("sys.argv", ["study", "--size", "reduced", "--rows", "gamma=0", *results, *given])
  assert command.main() == 2
  assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
