"""Checkpoints of a run, by Orbax: asynchronous, atomic, the newest few kept."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from sapr_jax.errors import InputError

Tree = TypeVar("Tree")


class Checkpointer:
  """Saves and restores one stage of a run: its arrays, and as JSON its position, what is not an array.

  Example:
    >>> checkpointer = Checkpointer(workdir / "checkpoints" / "train", keep=2)
    >>> position = checkpointer.position()
    >>> state = checkpointer.restore(state)
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2):
    import orbax.checkpoint as ocp  # imports slowly

    self._args, self._directory = ocp.args, directory
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "position"))

  def position(self) -> dict[str, Any] | None:
    """Returns the position in the newest checkpoint, None if there is none.

    Raises:
      InputError: If it cannot be read; the message names its directory.
    """
    if self._manager.latest_step() is None:
      return None
    position: dict[str, Any] = self._restore(position=self._args.JsonRestore())["position"]
    return position

  def restore(self, like: Tree) -> Tree:
    """Returns the newest state, with the structure, dtypes and placement of `like`; or `like` if there is none.

    Raises:
      InputError: If it cannot be read; the message names its directory.
    """
    if self._manager.latest_step() is None:
      return like
    target = jax.tree.map(_abstract, like)
    state: Tree = self._restore(state=self._args.StandardRestore(target))["state"]
    return state

  def _restore(self, **items: Any) -> Any:
    step = self._manager.latest_step()
    try:
      return self._manager.restore(step, args=self._args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds
      raise InputError(
        f"The checkpoint {self._directory / str(step)} cannot be read ({type(error).__name__}); remove that directory"
        " to resume from the one before."
      ) from error

  def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
    """Starts saving; the call returns when the state is copied from the devices. `step` grows from save to save."""
    items = self._args.Composite(state=self._args.StandardSave(state), position=self._args.JsonSave(dict(position)))
    self._manager.save(step, args=items)

  def close(self) -> None:
    """Waits until all is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _abstract(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return leaf
