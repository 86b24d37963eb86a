"""Several processes as one run: starting them, agreeing, and stopping together."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np
from jax._src.distributed import global_state

from sapr_jax.errors import InputError, one_line, os_errors_in_one_line
from sapr_jax.runtime.lifeline import PATIENCE_SECONDS, Lifeline
from sapr_jax.version import __version__

# `global_state.client` is a key-value store that works whatever the devices are. It has no public name; Orbax uses it.

T = TypeVar("T")

_HEARTBEAT_SECONDS = 40
_SHUTDOWN_SECONDS = 15
_DAY = 24 * 3600

# Options of JAX that programs and numbers depend on.
_OPTIONS = (
  *("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision"),
  *("jax_numpy_dtype_promotion", "jax_disable_jit"),
)

# Words in the errors of collectives and barriers when a process at the other end has gone.
_LOST = (
  *("Gloo", "NCCL", "Connection closed by peer", "Connection reset", "Socket closed"),
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "heartbeat", "barrier"),
)


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 300,
  problem: str = "",
) -> int:
  """Connects this process to the others of the run. Call it before anything else that uses JAX.

  Without arguments the processes find each other, on TPU pods and under SLURM and Open MPI.

  Args:
    coordinator: `HOST:PORT`, a free port of the machine of process 0 that all others can reach.
    num_processes: How many processes there are.
    process_id: Which one this is, from 0.
    timeout: Seconds to wait for the others; then the program ends.
    problem: Why this process cannot take part, if so; all of them raise it.

  Returns:
    Which process this is.

  Raises:
    InputError: If the arguments are wrong, no connection can be made, or the processes differ.
  """
  given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) not in (0, len(given)):
    raise InputError(f"{missing[0]} is missing; give --coordinator, --num_processes and --process_id, or none of them.")
  if coordinator is not None and num_processes is not None and process_id is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
      raise InputError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {coordinator!r}.")
    if not 0 <= process_id < num_processes:
      raise InputError(f"--process_id must be at least 0 and below --num_processes={num_processes}, got {process_id}.")
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  # Where a process does not come, JAX aborts with a stack trace; this ends the wait first, with one line.
  who = "the processes" if coordinator is None else f"process {process_id} of {num_processes} at {coordinator}"
  watch = threading.Timer(timeout, _give_up, [problem or f"{who} could not connect to the others within {timeout} s"])
  watch.daemon = True
  watch.start()
  try:
    if coordinator is not None and process_id == 0:
      # Where the port is taken, JAX raises an error or, now and then, crashes.
      socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (OSError, RuntimeError, ValueError) as error:
    if coordinator is None:
      raise InputError(
        f"no TPU pod, SLURM job or Open MPI job was found here ({one_line(error)}); give --coordinator,"
        " --num_processes and --process_id."
      ) from error
    raise InputError(
      f"process {process_id} cannot connect at --coordinator={coordinator} ({one_line(error)}); give an address of the"
      " machine of process 0 and a port that no other program has."
    ) from error
  finally:
    watch.cancel()
  global _lifeline
  _lifeline = Lifeline()
  together(lambda: _refuse(problem))
  versions = {"sapr_jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
  check_equal(
    **{f"the version of {name}": version for name, version in versions.items()},
    **{name: getattr(jax.config, name, None) for name in _OPTIONS},
  )
  return int(global_state.process_id)


def _refuse(problem: str) -> None:
  if problem:
    raise InputError(problem)


_lifeline: Lifeline | None = None  # where `initialize` has connected this process
_gathered = itertools.count()


def gather(text: str, *, seconds: float = _DAY) -> list[str]:
  """Returns the texts of all processes, in their order; all must call it.

  Raises `RuntimeError` if they do not within `seconds`; what they do before may take long.
  """
  if global_state.client is None or global_state.num_processes == 1:
    return [text]
  store, name = global_state.client, f"sapr_jax/gather/{next(_gathered)}"
  store.key_value_set(f"{name}/{global_state.process_id}", text)
  return [store.blocking_key_value_get(f"{name}/{i}", int(1000 * seconds)) for i in range(global_state.num_processes)]


def together(action: Callable[[], T]) -> T:
  """Does something on each process; it must not communicate.

  If it raises `InputError` on any process, all of them raise one with the message of the first.
  """
  result, problem = None, ""
  try:
    with os_errors_in_one_line("a file"):
      result = action()
  except InputError as error:
    if global_state.client is None:
      raise
    problem = str(error)
  problems = gather(problem)
  first = next((i for i, text in enumerate(problems) if text), None)
  if first is not None:
    raise InputError(problems[first] if first == 0 else f"on process {first}: {problems[first]}")
  return result  # type: ignore[return-value]  # no problem, so there is one


def decided_by_main(question: Callable[[], T]) -> T:
  """Returns on all processes what `question` returns, as JSON can hold it, on process 0, where alone it is called."""
  if jax.process_count() == 1:
    return question()
  answer = together(lambda: json.dumps(question()) if jax.process_index() == 0 else "")
  decision: T = json.loads(gather(answer)[0])
  return decision


def check_equal(**values: Any) -> None:
  """Checks that all processes have the same values, as JSON has them; raises `InputError` that says where not."""
  for number, text in enumerate(texts := gather(json.dumps(values, sort_keys=True))):
    here, there = json.loads(texts[0]), json.loads(text)
    for name in sorted(here.keys() | there.keys()):
      if here.get(name) != there.get(name):
        raise InputError(
          f"{name} is {here.get(name)!r} on process 0 and {there.get(name)!r} on process {number}; start all processes"
          " with the same command, code and data."
        )


def fingerprint(tree: Any) -> int:
  """Returns a checksum of the arrays of a tree, on the host or on one device."""
  checksum = 0
  for leaf in jax.tree.leaves(tree):
    checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
  return checksum


def lost_process(error: BaseException) -> str | None:
  """Says in one line that `error` came because another process has gone; None if it did not."""
  if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError | TimeoutError):
    return None
  if not any(text in str(error) for text in _LOST):
    return None
  if _lifeline is not None:
    time.sleep(PATIENCE_SECONDS)  # which says so itself, and ends this process meanwhile
  return (
    f"another process of this run has stopped ({one_line(error, 160)}); its own output says why. The checkpoints are"
    " whole: the same command on all processes resumes the run."
  )


def leave(status: int) -> int:
  """Ends this process's part of a run of several; call it last.

  If the others come here too, it returns the exit status `status`. If they do not, all end after a failure of this one.
  """
  if _lifeline is None:
    return status
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    # After a failure the others come at once, or do not know of it.
    gather("leaving", seconds=_DAY if status in (0, 75) else PATIENCE_SECONDS)
    _lifeline.close()
    jax.distributed.shutdown()
    return status
  except RuntimeError:
    _lifeline.end(status)


def _give_up(problem: str) -> None:
  print(
    f"error: {problem}; start every process, each with the same --coordinator and --num_processes and a --process_id of"
    " its own, and let them through the firewall.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)
