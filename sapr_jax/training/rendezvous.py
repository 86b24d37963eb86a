"""Where the processes of a run that was started by hand meet, before JAX connects them.

JAX aborts a process that cannot connect, with a stack trace and without saying who is missing. Here the processes count
themselves first, at the address at which JAX will: process 0 listens, the others say who they are and get its verdict.
"""

from __future__ import annotations

import json
import os
import socket
import time

from sapr_jax.errors import InputError

_RETRY_SECONDS = 0.2
_GREETING_SECONDS = 5.0
_MARK = "sapr_jax"


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
  """Returns when all processes of the run are there.

  Args:
    address: `HOST:PORT` of process 0.
    num_processes: How many there are.
    process_id: Which one this is.
    timeout: Seconds to wait for the others.

  Raises:
    InputError: If one does not come, comes twice, or counts otherwise; it is raised on all that are there.
  """
  if num_processes == 1:
    return
  deadline = time.monotonic() + timeout
  if process_id == 0:
    _receive(address, num_processes, deadline, timeout)
  else:
    _report(address, num_processes, process_id, deadline, timeout)


def _receive(address: str, num_processes: int, deadline: float, timeout: float) -> None:
  """Waits for all others and sends them the verdict: nothing, or what is wrong."""
  guests: dict[int, socket.socket] = {}
  problem = ""
  with _listen(address) as server:
    while len(guests) < num_processes - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        guest, _ = server.accept()
      except TimeoutError:
        missing = [str(i) for i in range(1, num_processes) if i not in guests]
        problem = (
          f"after {timeout:g} s, {_of(missing)} of {num_processes} had not come to {address}; start each process with"
          " the same --coordinator and --num_processes and a --process_id of its own, and see that a firewall lets"
          " them through."
        )
        break
      number, problem = _greet(guest, num_processes, guests)
      if number is None:
        guest.close()  # not one of ours
      else:
        guests.setdefault(number, guest)
        if guests[number] is not guest:
          _answer(guest, problem)
    for guest in guests.values():
      _answer(guest, problem)
  if problem:
    raise InputError(problem)


def _listen(address: str) -> socket.socket:
  host, port = address.rsplit(":", 1)
  try:
    # On all addresses, as JAX does: the name by which others know this machine may not be one of its own.
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", int(port)), backlog=1024)
  except OSError as error:
    raise InputError(
      f"process 0 cannot listen at port {port} of {host} ({os.strerror(error.errno or 0)}); give another port, or stop"
      " the program that has it."
    ) from error


def _greet(guest: socket.socket, num_processes: int, guests: dict[int, socket.socket]) -> tuple[int | None, str]:
  """Reads who has come; returns its number, None for a stranger, and what is wrong with it."""
  guest.settimeout(_GREETING_SECONDS)
  try:
    mark, count, number = json.loads(guest.makefile("r").readline())
  except (OSError, ValueError, TypeError):
    return None, ""
  if mark != _MARK:
    return None, ""
  if count != num_processes:
    return number, f"process 0 was started with --num_processes={num_processes} and process {number} with {count}."
  if number in guests:
    return number, f"two processes were started with --process_id={number}; each of the {num_processes} needs its own."
  return number, ""


def _answer(guest: socket.socket, problem: str) -> None:
  try:
    guest.sendall(json.dumps([_MARK, problem]).encode() + b"\n")
    guest.settimeout(1.0)
    guest.recv(1)  # it closes first, so that the port is free for JAX
  except OSError:
    pass
  guest.close()


def _report(address: str, num_processes: int, process_id: int, deadline: float, timeout: float) -> None:
  """Tells process 0 who is here and waits for its verdict."""
  host, port = address.rsplit(":", 1)
  host, reason = host.strip("[]"), "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, int(port)), timeout=left) as connection:
        connection.sendall(json.dumps([_MARK, num_processes, process_id]).encode() + b"\n")
        # Process 0 may have come later, and waits as long from then on.
        connection.settimeout(timeout + _GREETING_SECONDS)
        mark, problem = json.loads(connection.makefile("r").readline())
    except (OSError, ValueError, TypeError) as error:
      reason = getattr(error, "strerror", None) or str(error) or reason
      time.sleep(_RETRY_SECONDS)
      continue
    if problem:
      raise InputError(problem)
    if mark == _MARK:
      return
  raise InputError(
    f"process {process_id} could not reach process 0 at {address} within {timeout:g} s ({reason}); check --coordinator,"
    " and that process 0 runs and no firewall is in between."
  )


def _of(numbers: list[str]) -> str:
  return f"process {numbers[0]}" if len(numbers) == 1 else f"processes {', '.join(numbers)}"


__all__ = ["meet"]
