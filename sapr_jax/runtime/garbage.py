"""Python's garbage collection, which has nothing to find while modules are imported and programs traced."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
  """Lets no garbage collection happen within the block: it would take a tenth of what makes many objects that stay."""
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()
