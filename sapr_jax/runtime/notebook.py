"""Whether this is a notebook."""

from __future__ import annotations

import sys


def in_notebook() -> bool:
  """Says whether this process is the kernel of a notebook (Jupyter, Colab, VS Code)."""
  ipython = sys.modules.get("IPython")
  shell = None if ipython is None else ipython.get_ipython()
  return shell is not None and hasattr(shell, "kernel")
