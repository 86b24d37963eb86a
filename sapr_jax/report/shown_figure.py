"""A figure of matplotlib that a notebook shows, whether or not pyplot was used before."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
  """Is shown as an image where it is the last value of a cell; a plain `Figure` is only once pyplot has drawn one."""

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format="png")
    return buffer.getvalue()
