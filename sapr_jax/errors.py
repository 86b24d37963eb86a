"""Errors that a user can fix, and those that tell a scheduler what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class InputError(ValueError):
  """Input that cannot be used: a config value, a file, an array of the wrong shape.

  The message is one line: what must be, what it is, how to fix it. It is a `ValueError`, so
  library users need not know this class; `python -m sapr_jax.main` prints the message alone, without a traceback, and
  exits with a non-zero status.
  """

  def __init__(self, message: str) -> None:
    # A path or a name in it may have line breaks, or what a terminal cannot show.
    super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class DivergedError(ArithmeticError):
  """Training diverged: a number is not finite. `python -m sapr_jax.main` prints the message and exits with 3."""


class InterruptedRunError(Exception):
  """A run was asked to stop and has saved its work; `python -m sapr_jax.main` then exits with 75, for a scheduler."""


class InterruptedByUserError(InterruptedRunError, KeyboardInterrupt):
  """Ctrl-C, or the interrupt of a notebook, stopped a run, which has saved its work; also a `KeyboardInterrupt`."""


def one_line(error: BaseException, limit: int | None = None) -> str:
  """Returns the message of an exception as one line of at most `limit` characters and an ellipsis."""
  # A KeyError would put its message in quotes.
  text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
  return text if limit is None or len(text) <= limit else f"{text[:limit]} ..."


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
  """Turns the lack of a package within the block into an `InputError` that says which extra of this package has it."""
  try:
    yield
  except ImportError as error:
    package = error.name or one_line(error)
    raise InputError(f"{what} needs {package}, which is not installed; run: pip install 'sapr_jax[{extra}]'") from None


@contextlib.contextmanager
def os_errors_in_one_line(place: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what the operating system refuses within the block into an `InputError`.

  Its message has the path that the error names, or else `place`. A `TimeoutError` without a number is none of the
  operating system's: Orbax raises it where another process does not come.
  """
  try:
    yield
  except OSError as error:
    if error.errno is None and isinstance(error, TimeoutError):
      raise
    raise InputError(
      f"{error.filename or os.fspath(place)} cannot be used ({error.strerror or one_line(error, 200)}); what is on disk"
      " is whole: fix the disk or the path, and the same command goes on."
    ) from error
