"""Lets the site show `Example:` in a docstring as code, as it does for `Examples:`."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
  """Renames the section in every docstring."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    if obj.docstring:
      obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
