"""Several processes as one run: starting them, agreeing, and stopping together."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jaxlib
import numpy as np
from jax._src.clusters import ClusterEnv

from sapr_jax.errors import InputError, one_line
from sapr_jax.runtime.lifeline import PATIENCE_SECONDS, Lifeline
from sapr_jax.version import __version__

T = TypeVar("T")

_HEARTBEAT_SECONDS = 40  # should the lifeline fail: JAX then aborts what it has not heard of the others for so long
_SHUTDOWN_SECONDS = 15

# Options of JAX that programs and numbers depend on.
_OPTIONS = (
  *("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision"),
  *("jax_numpy_dtype_promotion", "jax_use_shardy_partitioner", "jax_disable_jit"),
)

_lifeline: Lifeline | None = None


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int | None = None,
  problem: str = "",
) -> int:
  """Connects this process to the others of the run. Call it before anything else that uses JAX.

  Without arguments the processes find each other, on TPU pods and under SLURM and Open MPI.

  Args:
    coordinator: `HOST:PORT`, a free port of the machine of process 0 that all others can reach.
    num_processes: How many processes there are.
    process_id: Which one this is, from 0.
    timeout: Seconds to wait for the others; by default 50, or 300 where they find each other.
    problem: Why this process cannot take part, if so; it is raised on all of them.

  Returns:
    Which process this is.

  Raises:
    InputError: If the arguments are wrong, no connection can be made, or the processes differ.
  """
  given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) not in (0, len(given)):
    raise InputError(f"{missing[0]} is missing; give --coordinator, --num_processes and --process_id, or none of them.")
  timeout = timeout or (300 if missing else 50)  # a scheduler may start machines one after the other
  local_devices = None
  try:
    if missing:
      coordinator, num_processes, process_id, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
      )
    if coordinator is None or num_processes is None or process_id is None:
      raise ValueError("no environment that JAX knows")
  except (OSError, RuntimeError, ValueError) as error:
    raise InputError(
      f"no TPU pod, SLURM job or Open MPI job was found here ({one_line(error)}); give --coordinator, --num_processes"
      " and --process_id."
    ) from error
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise InputError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {coordinator!r}.")
  if not problem and not 0 <= process_id < num_processes:
    problem = f"--process_id must be at least 0 and below --num_processes={num_processes}, got {process_id}."
  if problem:
    timeout = min(timeout, PATIENCE_SECONDS)
  global _lifeline
  try:
    _lifeline = Lifeline(coordinator, num_processes, process_id, timeout, problem)
  except InputError as error:
    raise InputError(problem or str(error)) from error
  versions = {"sapr_jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
  check_equal(
    **{f"the version of {name}": version for name, version in versions.items()},
    **{name: getattr(jax.config, name, None) for name in _OPTIONS},
  )
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      local_devices,
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (OSError, RuntimeError, ValueError) as error:
    raise InputError(
      f"process {process_id} cannot connect at --coordinator={coordinator} ({one_line(error)}); give an address of the"
      " machine of process 0 and a port that no other program has."
    ) from error
  return process_id


def gather(text: str) -> list[str]:
  """Returns the texts of all processes, in their order; all must call it."""
  if _lifeline is not None:
    return _lifeline.gather(text)
  if jax.process_count() == 1:
    return [text]
  raise InputError("JAX has several processes; connect them by sapr_jax.runtime.processes.initialize() before.")


def together(action: Callable[[], T]) -> T:
  """Does something on each process; it must not communicate.

  If it raises `InputError` on any process, all of them raise one with the message of the first.
  """
  result, problem = None, ""
  try:
    result = action()
  except InputError as error:
    if jax.process_count() == 1:
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


def leave(status: int) -> int:
  """Ends this process's part of a run of several; call it last.

  Once the others come here too, it returns the exit status `status`. If they do not, while this one cannot go on, all
  processes end.
  """
  if _lifeline is None:
    return status
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    _lifeline.gather("", "leave", timeout=None if status in (0, 75) else 3)
    jax.distributed.shutdown()
    return status
  except (queue.Empty, RuntimeError):
    _lifeline.end(status)


def crash() -> NoReturn:
  """Ends all processes after an error of this one, whose traceback it shows; call it where the error is handled."""
  time.sleep(3)  # if the error came because another process has gone, the lifeline says so and ends this one meanwhile
  traceback.print_exc()
  if _lifeline is not None:
    _lifeline.end(1)
  sys.exit(1)
