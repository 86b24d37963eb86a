"""Runs of several processes on this machine: they equal a run of one process, and stop together."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest
from small_run import FAST_COMPILATION, check_same_run

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
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
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
    flags = f"--xla_force_host_platform_device_count={2 // count} {FAST_COMPILATION}"
    environment = self._environment | {"XLA_FLAGS": flags} | ({"STOP": stop} if stop else {})
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
    (["--config.data.train_images=127"], {}, "data.train_images is 128 on process 0 and 127 on process 1"),
    ([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "got 1 on process 0, 2 on process 1; give each"),
    ([], {"JAX_ENABLE_X64": "1"}, "jax_enable_x64 is False on process 0 and True on process 1"),
    (["--nonsense"], {}, "Unknown command line flag 'nonsense'"),
    (["--config.data.nonsense=1"], {}, "the configuration has no such field"),
    (["--num_processes=3"], {}, "--num_processes is 2 on process 0 and 3 on process 1; give all the same"),
    (["--num_processes=1"], {}, "--process_id must be at least 0 and below --num_processes=1, got 1"),
  ],
)
def test_processes_that_differ_are_refused(launcher, tmp_path, last, environment, text):
  for status, _, err in launcher.run(2, tmp_path / "run", last=last, last_environment=environment):
    assert status == 2
    assert text in err and err.startswith("error: ") and err.count("\n") == 1
  assert not (tmp_path / "run").exists()


def start(
  *arguments, then="", program="lifeline.SILENCE_SECONDS = 1; lifeline.Lifeline(*{!r}); print('met', flush=True)"
):
  """Starts a process that connects to others, and then does something."""
  text = (
    f"import os, signal, time; from sapr_jax.runtime import lifeline, processes; {program.format(arguments)}; {then}"
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([sys.executable, "-c", text], env=environment, **pipes)


@pytest.mark.parametrize(
  ("others", "text"),
  [
    ([(2, 0, 20), (2, 1, 20, "bad flag")], "bad flag"),
    pytest.param([(3, 0, 20), (3, 1, 20), (3, 1, 20)], "started with --process_id=1", marks=pytest.mark.slow),
    pytest.param([(2, 0, 20), (2, 0, 20)], "started with --process_id=0", marks=pytest.mark.slow),
    ([(2, 0, 1)], "process 1 of 2 did not come to --coordinator=127.0.0.1:"),
    ([(2, 1, 1)], "process 1 found at --coordinator=127.0.0.1:"),
  ],
)
def test_a_run_that_cannot_start_ends_all_processes(others, text):
  address = f"127.0.0.1:{free_port()}"
  for process in [start(address, *arguments) for arguments in others]:
    out, err = process.communicate(timeout=300)
    assert process.returncode and not out
    assert text in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_has_gone_ends_the_others(killed, name):
  address = f"127.0.0.1:{free_port()}"
  wait, stop = "time.sleep(300)", f"time.sleep(1); os.kill(os.getpid(), signal.{name}); time.sleep(9)"
  others = [start(address, 3, i, 60, then=stop if i == killed else wait) for i in range(3)]
  gone = others.pop(killed)
  for process in others:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    how = "has stopped" if name == "SIGKILL" else "has not been heard of for 1 s"
    assert err.startswith(f"error: process {killed} of this run {how}; its own output") and err.count("\n") == 1
  gone.kill()
  gone.communicate()


def test_a_port_in_use_is_named():
  with socket.create_server(("", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    _, err = start(address, 2, 0, program="processes.initialize(*{!r}, timeout=1)").communicate(timeout=300)
  assert f"InputError: process 0 found at --coordinator={address} no process 0 that waits for it" in err
  assert "a port that no other program has" in err


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (("10.0.0.1:1234", 2, None), "--process_id is missing"),
    ((None, 2, 0), "--coordinator is missing"),
    (("10.0.0.1", 2, 0), "--coordinator must be HOST:PORT, such as .*, got '10.0.0.1'"),
    (("10.0.0.1:port", 2, 0), "--coordinator must be HOST:PORT"),
    (("127.0.0.1:1234", 0, 0), "--process_id must be at least 0 and below --num_processes=0, got 0"),
    (("127.0.0.1:1234", 2, 2), "--process_id must be at least 0 and below --num_processes=2, got 2"),
    (("127.0.0.1:1234", 2, -1), "--process_id must be at least 0 .*, got -1"),
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
