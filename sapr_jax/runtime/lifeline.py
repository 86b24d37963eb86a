"""Connections between the processes of a run that tell when one has gone, long before JAX does."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from jax._src.distributed import global_state

PATIENCE_SECONDS = 5
"""How long to wait for what the others do at the same time."""

_ID_BYTES = 4


class Lifeline:
  """A connection from process 0 to each other process, over which nothing is sent: its end says that one has gone.

  A thread for each then ends this process with one line. JAX would wait for its heartbeats, and end with a stack trace;
  it still does where a firewall lets no connection through.
  """

  _PORT = "sapr_jax/lifeline"

  def __init__(self) -> None:
    self._over = threading.Event()
    self._connections: list[socket.socket] = []
    store: Any = global_state.client
    if global_state.process_id == 0:
      both = socket.has_dualstack_ipv6()
      family = socket.AF_INET6 if both else socket.AF_INET
      server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
      store.key_value_set(self._PORT, str(server.getsockname()[1]))
      threading.Thread(target=self._accept, args=(server,), daemon=True).start()
      return
    host = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
    port = int(store.blocking_key_value_get(self._PORT, 1000 * PATIENCE_SECONDS))
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), timeout=PATIENCE_SECONDS)
      connection.sendall(global_state.process_id.to_bytes(_ID_BYTES))
      self._keep(connection, 0)

  def _accept(self, server: socket.socket) -> None:
    while True:
      connection, _ = server.accept()
      with contextlib.suppress(OSError):
        connection.settimeout(PATIENCE_SECONDS)
        if number := connection.recv(_ID_BYTES):
          self._keep(connection, int.from_bytes(number))

  def _keep(self, connection: socket.socket, number: int) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a machine that has gone
    self._connections.append(connection)
    threading.Thread(target=self._wait, args=(connection, number), daemon=True).start()

  def _wait(self, connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
      connection.recv(1)
    if self._over.is_set():
      return
    print(
      f"error: process {number} of this run has stopped; its own output says why. What was saved is whole: the same"
      " command on all processes resumes the run.",
      file=sys.stderr,
      flush=True,
    )
    self.end(1)

  def end(self, status: int) -> NoReturn:
    """Ends this process, and with it the others."""
    self._over.set()
    for connection in self._connections:
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    if global_state.process_id == 0:
      time.sleep(1)  # JAX's coordinator goes with this process, and JAX aborts those that miss it
    os._exit(status)  # what is run at exit would wait for the others

  def close(self) -> None:
    """Lets all processes go: they are at their end."""
    self._over.set()
