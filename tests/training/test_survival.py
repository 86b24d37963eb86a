"""Runs that are stopped, killed, damaged or disturbed end as if nothing had happened, or say what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_run import check_same_run, small_config

import sapr_jax as sapr
from sapr_jax import artifacts, training
from sapr_jax.errors import DivergedError
from sapr_jax.training import experiment, loop, passes, workdir

run_module = sys.modules["sapr_jax.training.run"]  # `training.run` is the function

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")


class StoppedError(Exception):
  pass


@pytest.mark.slow
def test_a_run_stopped_in_each_stage_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
  write = artifacts.Recorder.write

  def stop_at(step):
    def stopping(recorder, record):
      write(recorder, record)  # the record is there, its checkpoint is not
      if record["step"] == step:
        raise StoppedError

    return stopping

  for step in (3, 6):
    monkeypatch.setattr(artifacts.Recorder, "write", stop_at(step))
    with pytest.raises(StoppedError):
      training.run(small_config(), tmp_path / "run")
  monkeypatch.setattr(artifacts.Recorder, "write", write)
  training.run(small_config(), tmp_path / "run")

  check_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_goes_on_at_the_step(whole, tmp_path, monkeypatch):
  save, places = artifacts.Checkpointer.save, []

  def stop_at(stop):
    def saving(checkpointer, step, state, position):
      save(checkpointer, step, state, position)
      places.append((position["epoch"], position["step"]))
      if places[-1] == stop:
        raise StoppedError

    return saving

  config = small_config(checkpoint__every_steps=3)
  for stop in ((2, 2), (3, 3), (0, 3)):
    monkeypatch.setattr(artifacts.Checkpointer, "save", stop_at(stop))
    with pytest.raises(StoppedError):
      training.run(config, tmp_path / "run")
    places.append("stopped")
  monkeypatch.setattr(artifacts.Checkpointer, "save", stop_at(None))
  training.run(config, tmp_path / "run")
  train = [(0, 3), (1, 0), (1, 1), (1, 4), (2, 0), (2, 2), "stopped", (3, 0), (3, 3), "stopped", (4, 0)]
  assert places == [*train, (0, 3), "stopped", (1, 0), (1, 1), (1, 4), (2, 0)]

  check_same_run(tmp_path / "run", whole[0])


def test_a_run_stopped_between_the_stages_goes_on_there(whole, tmp_path, monkeypatch):
  shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "finetune")
  (tmp_path / "run" / "summary.json").unlink()
  recalibrate = run_module.recalibrate_batch_norm

  def stopped(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return recalibrate(*args, **options)

  monkeypatch.setattr(run_module, "recalibrate_batch_norm", stopped)
  with pytest.raises(sapr.InterruptedRunError, match="SIGTERM"):
    training.run(small_config(), tmp_path / "run")
  monkeypatch.setattr(run_module, "recalibrate_batch_norm", recalibrate)
  training.run(small_config(), tmp_path / "run")
  check_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_a_run_whose_checkpoints_were_lost_starts_again(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "train")
  (tmp_path / "run" / "summary.json").write_text("{")
  training.run(small_config(), tmp_path / "run")
  check_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_stop(whole, tmp_path, monkeypatch):
  advance, evaluate = loop.Progress.advance, passes.Passes.evaluate

  def signal_at(number, steps_done):
    def advancing(progress, steps):
      advance(progress, steps)
      if progress._done == steps_done:
        signal.raise_signal(number)

    return advancing

  for number, steps_done, name in ((signal.SIGTERM, 7, "SIGTERM"), (signal.SIGINT, 15, "SIGINT")):
    monkeypatch.setattr(loop.Progress, "advance", signal_at(number, steps_done))
    with pytest.raises(sapr.InterruptedRunError, match=f"stopped by {name}, all work saved; the same command"):
      training.run(small_config(), tmp_path / "run")
  monkeypatch.setattr(loop.Progress, "advance", advance)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers are gone

  # While evaluating: the run stops where the next checkpoint is due.
  def evaluating(*args):
    signal.raise_signal(signal.SIGTERM)
    return evaluate(*args)

  monkeypatch.setattr(passes.Passes, "evaluate", evaluating)
  with pytest.raises(sapr.InterruptedRunError):
    training.run(small_config(), tmp_path / "run")
  monkeypatch.setattr(passes.Passes, "evaluate", evaluate)
  assert [record["step"] for record in artifacts.read_records(tmp_path / "run")] == [1, 2, 3]
  training.run(small_config(), tmp_path / "run")
  check_same_run(tmp_path / "run", whole[0])


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
  def advancing(*args):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    pytest.fail("the run went on")

  monkeypatch.setattr(loop.Progress, "advance", advancing)
  with pytest.raises(KeyboardInterrupt):
    training.run(small_config(), tmp_path / "run")


def test_two_runs_in_one_work_directory_are_refused(tmp_path):
  config = small_config()
  with workdir.locked(tmp_path / "run", config):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(sapr.InputError, match=rf"Another run is in .*run \(process {os.getpid()} on .*\); wait for it"):
      training.run(config, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
  with workdir.locked(tmp_path / "run", config):  # the lock goes with the run
    pass


def test_divergence_names_the_first_bad_tensor_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
  with pytest.raises(
    DivergedError,
    match=r"train_loss is nan in epoch 1 of train, step \d of 5, at learning rate 1e\+30: training diverged; the first"
    r" tensor that is not finite is (params|batch_stats)/\w+",
  ):
    training.run(small_config(train__learning_rate=1e30), tmp_path / "run")
  assert not any(d.name.isdigit() for d in (tmp_path / "run" / "checkpoints" / "train").iterdir())


@pytest.mark.parametrize(
  "leaf", ["params", *(pytest.param(leaf, marks=pytest.mark.slow) for leaf in ("batch_stats", "opt_state"))]
)
def test_what_the_last_step_of_a_stage_left_behind_is_looked_at(tmp_path, monkeypatch, leaf):
  step = passes.WeightPass.step

  def last_step_overflows(weights, state, batches):
    state, metrics = step(weights, state, batches)
    if int(state.step) == 20 and state.masks:
      infinite = jax.tree.map(lambda x: x + np.inf if x.dtype == np.float32 else x, getattr(state, leaf))
      state = dataclasses.replace(state, **{leaf: infinite})
    return state, metrics

  monkeypatch.setattr(passes.WeightPass, "step", last_step_overflows)
  with pytest.raises(DivergedError, match=rf"not finite in epoch 4 of train, step 5 of 5, .* not finite is {leaf}/"):
    training.run(small_config(), tmp_path / "run")
  assert [record["step"] for record in artifacts.read_records(tmp_path / "run")] == [1, 2, 3]


def test_a_loss_on_the_test_images_that_is_not_finite_is_divergence():
  parts = experiment.build(small_config())
  variables = jax.tree.map(lambda leaf: leaf * np.nan, parts.variables)
  with pytest.raises(DivergedError, match="the loss on the test images is nan: training diverged"):
    parts.passes.evaluate(parts.model, variables)


@pytest.mark.slow
def test_fine_tuning_of_a_training_that_was_lost_is_set_aside(whole, tmp_path, monkeypatch):
  def stop(*args, **options):
    raise StoppedError

  shutil.copytree(whole[0], tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  checkpoints = tmp_path / "run" / "checkpoints"
  shutil.rmtree(checkpoints / "train" / "24")
  monkeypatch.setattr(loop, "train", stop)
  for name in ("finetune_before_1", "finetune_before_2"):
    with pytest.raises(StoppedError):
      training.run(small_config(), tmp_path / "run")
    assert {path.name for path in (checkpoints / name).iterdir()} == {"6", "12"}
    shutil.copytree(checkpoints / name, checkpoints / "finetune")


@pytest.mark.parametrize("lost", ["pruned/weights.safetensors", "dense/weights.safetensors"])
def test_a_finished_run_whose_model_is_lost_writes_it_again(whole, tmp_path, lost):
  shutil.copytree(whole[0], tmp_path / "run")
  (tmp_path / "run" / lost).write_bytes(b"")
  training.run(small_config(), tmp_path / "run")
  check_same_run(tmp_path / "run", whole[0])


def test_accuracy_at_chance_is_warned_about(whole, tmp_path, monkeypatch, capsys):
  shutil.copytree(whole[0], tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  monkeypatch.setattr(passes.Passes, "evaluate", lambda *args: {"accuracy": 0.1, "loss": 2.3})
  training.run(small_config(), tmp_path / "run")
  assert "warning: the pruned network is right on 10.00% of the test images, which is chance for 10 classes" in (
    capsys.readouterr().out
  )


@contextlib.contextmanager
def program(workdir):
  """Starts the command as users do, in a process group of its own."""
  overrides = ["--config.train.epochs=1000", "--config.data.train_images=320", "--config.eval_batch_size=100"]
  command = [sys.executable, "-m", "sapr_jax.main", "--config=configs/digits.py", f"--workdir={workdir}"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen([*command, *overrides], env=environment, start_new_session=True, **pipes) as process:
    try:
      yield process
    finally:
      process.kill()


STOPPED = "stopped by SIGTERM, all work saved; the same command resumes the run\n"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2, 5])
def test_a_program_hears_a_signal_at_any_instant(tmp_path, seconds):
  with program(tmp_path / "run") as process:
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
  assert (process.returncode, err) == (75, STOPPED)


@pytest.mark.slow
def test_a_program_whose_output_nobody_reads_goes_on_and_saves_when_told_to_stop(tmp_path):
  with program(tmp_path / "run") as process:
    while not process.stdout.readline().startswith("train 1/1000"):
      assert process.poll() is None
    process.stdout.close()
    while len(artifacts.read_records(tmp_path / "run")) < 3:  # each epoch has its line of output
      assert process.poll() is None
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    err = process.stderr.read()
    process.wait()
  assert (process.returncode, err) == (75, STOPPED)
  assert any(d.name.isdigit() for d in (tmp_path / "run" / "checkpoints" / "train").iterdir())
