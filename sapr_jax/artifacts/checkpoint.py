"""Checkpoints of a run, by Orbax: asynchronous, atomic, the newest few kept."""

from __future__ import annotations

import pathlib
from typing import Any, TypeVar

import jax

from sapr_jax.errors import InputError

Tree = TypeVar("Tree")


class Checkpointer:
  """Saves and restores the state of one stage of a run; `step` is the number of finished epochs.

  Example:
    >>> checkpointer = Checkpointer(workdir / "checkpoints" / "train", keep=2)
    >>> state, epoch = checkpointer.restore_latest(state)
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2):
    import orbax.checkpoint as ocp  # imports slowly

    self._args, self._directory = ocp.args, directory
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

  @property
  def latest_epoch(self) -> int | None:
    """Number of finished epochs in the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def restore_latest(self, like: Tree) -> tuple[Tree, int]:
    """Returns the newest state, with the structure, dtypes and placement of `like`, and its epoch; or (like, 0).

    Raises:
      InputError: If it cannot be read; the message names its directory.
    """
    epoch = self.latest_epoch
    if epoch is None:
      return like, 0
    target = jax.tree.map(_abstract, like)
    try:
      restored: Any = self._manager.restore(epoch, args=self._args.StandardRestore(target))
    except Exception as error:  # Orbax and TensorStore raise many kinds
      raise InputError(
        f"The checkpoint {self._directory / str(epoch)} cannot be read ({type(error).__name__}); remove that directory"
        " to resume from the one before."
      ) from error
    return restored, epoch

  def save(self, epoch: int, state: Any) -> None:
    """Starts saving `state`; the call returns when it is copied from the devices."""
    self._manager.save(epoch, args=self._args.StandardSave(state))

  def close(self) -> None:
    """Waits until all is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _abstract(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return leaf
