"""Connections between the processes of a run besides JAX's, which waits long for one that has gone, and then aborts."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, NoReturn, TextIO

from sapr_jax.errors import InputError, one_line

SILENCE_SECONDS = 15
"""A process that has not been heard of for so long counts as gone."""

PATIENCE_SECONDS = 10
"""How long to wait for what should come within moments, on a busy machine too."""

_GREETING = "sapr_jax\n"


class Lifeline:
  """Connects process 0 to each of the others, before JAX starts, at the address that JAX will use.

  Over it the processes agree, whatever their devices are, and learn at once that one of them has gone: threads wait for
  that, and end this process with one line.

  Args:
    coordinator: `HOST:PORT` of process 0.
    count: How many processes there are.
    number: Which one this is.
    timeout: Seconds to wait for the others.
    problem: Why this process cannot take part, if so; all end.

  Raises:
    InputError: If not all come, or one of them cannot take part.
  """

  def __init__(self, coordinator: str, count: int, number: int, timeout: float, problem: str = ""):
    host, _, port = coordinator.rpartition(":")
    self._address, self._shown = (host.strip("[]"), int(port)), f"--coordinator={coordinator}"
    self._count, self._number = count, number
    self._peers: dict[int, socket.socket] = {}  # of process 0, all others; of another, process 0
    self._inbox = {(i, kind): queue.SimpleQueue[Any]() for i in range(max(count, 1)) for kind in ("gather", "leave")}
    self._sending, self._ending = threading.Lock(), threading.Lock()
    self._over = bool(problem)
    threading.Thread(target=self._beat, daemon=True).start()
    note = f"process {number} waits for the others at {coordinator}, {timeout:.0f} s at most"
    watch = threading.Timer(PATIENCE_SECONDS, print, [note], {"file": sys.stderr, "flush": True})
    watch.daemon = True
    watch.start()
    try:
      self._meet(time.monotonic() + timeout, problem)
    finally:
      watch.cancel()

  def gather(self, text: str, kind: str = "gather", timeout: float | None = None) -> list[str]:
    """Returns the texts of all processes, in their order; raises `queue.Empty` if they do not come in time."""
    others = range(1, self._count)
    if self._number:
      self._send(self._peers[0], kind, text)
      texts: list[str] = self._inbox[0, kind].get(timeout=timeout)
      return texts
    texts = [text, *(self._inbox[i, kind].get(timeout=timeout) for i in others)]
    self._over = kind == "leave"
    for i in others:
      self._send(self._peers[i], kind, texts)
    return texts

  def end(self, status: int, problem: str | None = None) -> NoReturn:
    """Ends this process at once, and through process 0 all others; says why unless the user knows it already."""
    with self._ending:  # for good, so that there is one line
      if problem is not None:
        print(f"error: {problem}", file=sys.stderr, flush=True)
      self._tell(status, problem or _stopped(self._number))
      os._exit(status)  # what is run at exit would wait for the others

  def _tell(self, status: int, problem: str) -> None:
    if self._number == 0 and self._peers:
      for peer in self._peers.values():
        self._send(peer, "end", [status, problem])
      time.sleep(1)  # when the service of JAX goes, which is in this process, JAX aborts those that are still there

  def _meet(self, deadline: float, problem: str) -> None:
    if self._number == 0:
      try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", self._address[1]), family=family, dualstack_ipv6=both)
      except OSError:
        # Another program has the port; but if it is a second process 0, that tells all.
        deadline = min(deadline, time.monotonic() + 2)
      else:
        with server:
          self._invite(server, deadline, problem)
        return
    self._join(deadline, problem)

  def _invite(self, server: socket.socket, deadline: float, problem: str) -> None:
    """Waits as process 0 for all others, and tells them whether the run can start."""
    while (missing := sorted({*range(1, self._count)} - self._peers.keys())) and time.monotonic() < deadline:
      try:
        server.settimeout(deadline - time.monotonic())
        peer, _ = server.accept()
        peer.settimeout(PATIENCE_SECONDS)
        peer.sendall(_GREETING.encode())
        file = peer.makefile(errors="replace")
        number, count, found = json.loads(file.readline())
      except (OSError, ValueError, TypeError):
        continue  # not one of ours
      if found:
        found = f"on process {number}: {found}"
      elif count != self._count:
        found = f"--num_processes is {self._count} on process 0 and {count} on process {number}; give all the same."
      elif number not in missing:
        found = f"two processes were started with --process_id={number}; give each its own."
      if found and not problem:  # those that are still to come hear it too
        problem, deadline, self._over = found, min(deadline, time.monotonic() + PATIENCE_SECONDS), True
      if number in missing:
        self._watch(number, peer, file)
      else:
        self._send(peer, "end", [2, problem])
    if missing and not problem:
      problem = (
        f"process {', '.join(map(str, missing))} of {self._count} did not come to {self._shown} in time; start every"
        " process with the same --coordinator and --num_processes, let them through the firewall, or raise"
        " --connect_seconds."
      )
    if problem:
      self._over = True
      self._tell(2, problem)
      raise InputError(problem)
    for peer in self._peers.values():
      self._send(peer, "gather", [])

  def _join(self, deadline: float, problem: str) -> None:
    """Tells process 0 that this one has come, and waits for the others."""
    while True:
      wait = max(0.1, min(PATIENCE_SECONDS, deadline - time.monotonic()))
      try:
        peer = socket.create_connection(self._address, timeout=wait)
      except OSError as error:
        why = f"{one_line(error)}; start process 0 with the same --coordinator, or raise --connect_seconds."
      else:
        why = "another program, or a run that has started; give a port that no other program has."
        deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)  # it may be an earlier run, about to end
        with contextlib.suppress(OSError):
          file = peer.makefile(errors="replace")
          if file.readline() == _GREETING:
            break
      if time.monotonic() > deadline:
        raise InputError(f"process {self._number} found at {self._shown} no process 0 that waits for it, but {why}")
      time.sleep(0.3)
    self._send(peer, self._number, self._count, problem)
    if problem:
      raise InputError(problem)
    self._watch(0, peer, file)
    self._inbox[0, "gather"].get()

  def _watch(self, number: int, peer: socket.socket, file: TextIO) -> None:
    peer.settimeout(SILENCE_SECONDS)
    self._peers[number] = peer
    threading.Thread(target=self._listen, args=(number, file), daemon=True).start()

  def _listen(self, number: int, file: TextIO) -> None:
    problem = _stopped(number)
    try:
      for line in file:
        if line != "\n":
          kind, content = json.loads(line)
          if kind == "end":
            self._lose(*content)
            return
          self._over |= kind == "leave" and self._number != 0
          self._inbox[number, kind].put(content)
    except TimeoutError:
      problem = _stopped(number, f"has not been heard of for {SILENCE_SECONDS} s")
    except (OSError, ValueError):
      pass
    self._lose(1, problem)

  def _lose(self, status: int, problem: str) -> None:
    if not self._over:
      self.end(status, problem)

  def _beat(self) -> None:
    while True:
      time.sleep(SILENCE_SECONDS / 5)
      for peer in list(self._peers.values()):
        self._send(peer)

  def _send(self, peer: socket.socket, *message: Any) -> None:
    """Sends a message, or an empty one as a sign of life; the thread that listens notices where there is nobody."""
    try:
      with self._sending:
        peer.sendall(f"{json.dumps(message) if message else ''}\n".encode())
    except OSError:
      pass


def _stopped(number: int, how: str = "has stopped") -> str:
  return (
    f"process {number} of this run {how}; its own output says why. What was saved is whole: the same command on all"
    " processes resumes the run."
  )
