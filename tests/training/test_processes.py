"""Runs of several processes on this machine: they equal a run of one process, and stop together."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest
from jax_options import virtual_devices
from small_run import check_same_run

import sapr_jax as sapr
from sapr_jax.runtime import processes

ROOT = pathlib.Path(__file__).parent.parent.parent

TINY = [
  "--config=configs/digits.py",
  "--config.model.name=tiny",
  "--config.data.train_images=128",
  "--config.data.test_images=50",
  "--config.eval_batch_size=32",
  "--config.train.epochs=3",
  "--config.train.batch_size=32",
  "--config.train.accumulate=2",
  "--config.train.decay_epochs=(2,)",
  "--config.prune.select=unjoined",
  "--config.prune.start_epoch=1",
  "--config.prune.gamma=0.1",
  "--config.generator.batch_size=32",
  "--config.finetune.epochs=1",
  "--config.finetune.batch_size=32",
  "--config.finetune.decay_epochs=()",
  "--config.checkpoint.every_steps=2",
  "--config.report.latency_batch_sizes=(1,)",
  "--config.report.latency_repeats=1",
  "--config.report.page=False",
]


def free_port():
  with socket.socket() as listener:
    listener.bind(("", 0))
    return listener.getsockname()[1]


class Launcher:
  """Starts processes that share two devices, and waits for them."""

  def __init__(self, cache):
    self._environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def run(self, count, workdir, *arguments, last=(), last_environment=None, stop=None, timeout=600):
    """Returns (exit status, standard output, standard error) of each process.

    Args:
      count: Number of processes.
      workdir: Work directory.
      arguments: More arguments.
      last: More arguments of the last process.
      last_environment: More of its environment.
      stop: See `tiny_main`.
      timeout: Seconds until they count as hanging.
    """
    environment = self._environment | virtual_devices(2 // count) | ({"STOP": stop} if stop else {})
    connect = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"] if count > 1 else []
    command = [sys.executable, str(ROOT / "tests/training/tiny_main.py"), *TINY, f"--workdir={workdir}", *arguments]
    started = [
      subprocess.Popen(
        [*command, *connect, *([f"--process_id={i}"] if connect else []), *(last if i == count - 1 else ())],
        cwd=ROOT,
        env=environment | ((last_environment or {}) if i == count - 1 else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(count)
    ]
    try:
      ends = [process.communicate(timeout=timeout) for process in started]
    finally:
      for process in started:
        process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, ends, strict=True)]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  return Launcher(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "run"
  ((status, _, err),) = launcher.run(1, workdir)
  assert status == 0, err
  return workdir


def own_lines(output):
  return [line for line in output.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_killed_end_like_one_that_is_not(launcher, alone, tmp_path):
  workdir = tmp_path / "run"
  # SIGTERM to one of them: both save at the same step and stop.
  (status, out, err), (other_status, other_out, other_err) = launcher.run(2, workdir, stop="SIGTERM 1 0 2")
  assert (status, other_status) == (75, 75), (err, other_err)
  assert "stopped by a signal, all work saved" in err and "stopped by" not in other_err
  assert own_lines(out) and not own_lines(other_out)

  # One is killed while a checkpoint is being written: the other ends too, and says why.
  (status, _, err), (other_status, _, _) = launcher.run(2, workdir, stop="SIGKILL 1 1 2")
  assert other_status == -9
  assert status == 1
  assert err.startswith("error: process 1 of this run has stopped; its own output says why") and err.count("\n") == 1

  # A refusal of the first process is that of all, and each says it in one line.
  (status, _, err), (other_status, _, other_err) = launcher.run(2, workdir, "--config.seed=1")
  assert (status, other_status) == (2, 2)
  for line in (err, other_err):
    assert line.startswith("error: ") and "seed was 0 and is now 1" in line and line.count("\n") == 1

  (status, out, err), (other_status, other_out, _) = launcher.run(2, workdir)
  assert (status, other_status) == (0, 0), err
  assert "train: going on after epoch 1/3" in out and not own_lines(other_out)
  check_same_run(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("last", "environment", "text"),
  [
    (
      ["--config.train.learning_rate=0.3"],
      {},
      "train.learning_rate is 0.1 on process 0 and 0.3 on process 1; start all",
    ),
    ([], virtual_devices(2), "got 1 on process 0, 2 on process 1; give each"),
    ([], {"JAX_ENABLE_X64": "1"}, "jax_enable_x64 is False on process 0 and True on process 1"),
    (["--nonsense"], {}, "Unknown command line flag 'nonsense'"),
  ],
)
def test_processes_that_differ_are_refused(launcher, tmp_path, last, environment, text):
  for status, _, err in launcher.run(2, tmp_path / "run", last=last, last_environment=environment):
    assert status == 2
    assert text in err and err.startswith("error: ") and err.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others():
  program = (
    "import os, signal, time; from sapr_jax.runtime import processes; processes.initialize(*{!r}); time.sleep(1);"
    " os.kill(os.getpid(), signal.SIGKILL) if {} == 1 else time.sleep(300)"
  )
  address, environment = f"127.0.0.1:{free_port()}", {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  commands = [[sys.executable, "-c", program.format((address, 3, i), i)] for i in range(3)]
  started = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
  errors = [process.communicate(timeout=300)[1] for process in started]
  assert [process.returncode for process in started] == [1, -9, 1]
  for i, gone in ((0, 1), (2, 0)):
    (line,) = own_lines(errors[i])
    assert line.startswith(f"error: process {gone} of this run has stopped; its own output says why")


@pytest.mark.parametrize(("number", "missing"), [(0, 1), (1, 0)])
def test_a_process_that_waits_in_vain_ends_with_one_line(number, missing):
  program = "from sapr_jax.runtime import processes; processes.initialize(*{!r}, timeout=1)"
  address = f"127.0.0.1:{free_port()}"
  command = [sys.executable, "-c", program.format((address, 2, number))]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 2
  (line,) = own_lines(done.stderr)
  assert line.startswith(f"error: process {number} of 2 at {address} could not connect to the others within 1 s; start")


def test_a_port_in_use_is_named():
  program = "from sapr_jax.runtime import processes; processes.initialize(*{!r}, timeout=5)"
  with socket.create_server(("", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-c", program.format((address, 2, 0))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert f"InputError: process 0 cannot connect at --coordinator={address}" in done.stderr
  assert "a port that no other program has" in done.stderr


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (("10.0.0.1:1234", 2, None), "--process_id is missing"),
    ((None, 2, 0), "--coordinator is missing"),
    (("10.0.0.1", 2, 0), "--coordinator must be HOST:PORT, such as .*, got '10.0.0.1'"),
    (("10.0.0.1:port", 2, 0), "--coordinator must be HOST:PORT"),
    (("10.0.0.1:1234", 0, 0), "--process_id must be at least 0 and below --num_processes=0, got 0"),
    (("10.0.0.1:1234", 2, 2), "--process_id must be at least 0 and below --num_processes=2, got 2"),
    (("10.0.0.1:1234", 2, -1), "--process_id must be at least 0 .*, got -1"),
  ],
)
def test_wrong_arguments_are_refused(arguments, text):
  with pytest.raises(sapr.InputError, match=text):
    processes.initialize(*arguments, timeout=1)


def test_alone_there_is_nothing_to_agree_upon():
  assert processes.gather("text") == ["text"]
  assert processes.decided_by_main(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
  assert processes.together(lambda: 3) == 3
  processes.check_equal(seed=1)
  with pytest.raises(sapr.InputError, match=r"^as it is$"):
    processes.together(lambda: (_ for _ in ()).throw(sapr.InputError("as it is")))
