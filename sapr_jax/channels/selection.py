"""Which of the channel groups that can be cut are offered: by their kind, and by patterns of their names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from sapr_jax.channels.graph import SELECTIONS, ChannelGroup, Selection
from sapr_jax.checks import shown
from sapr_jax.errors import InputError

Patterns = str | Sequence[str]
"""A glob, or several: of names of groups, or of modules that hold them."""


def selected(
  groups: Sequence[ChannelGroup], select: Selection, include: Patterns = (), exclude: Patterns = ()
) -> list[ChannelGroup]:
  """Returns the groups that `select` chooses, that a pattern of `include` matches, and none of `exclude`.

  Args:
    groups: All groups that can be cut exactly.
    select: See `trace_channels`.
    include: Globs (`fnmatch`, with case; `*` goes over `/`) of names of groups or of modules they lie in; () for all.
    exclude: The same.

  Raises:
    InputError: If `select` is unknown, or a pattern is no text or matches none of `groups`, chosen or not.
  """
  chosen = SELECTIONS.get(select) if isinstance(select, str) else select
  if not callable(chosen):
    raise InputError(f"select must be one of {', '.join(SELECTIONS)}, or a predicate, got {shown(select)}.")
  names = [group.name for group in groups]
  included, excluded = (_matched(name, given, names) for name, given in (("include", include), ("exclude", exclude)))
  return [
    group
    for group in groups
    if (not include or group.name in included) and group.name not in excluded and chosen(group)
  ]


def choice(select: Selection, include: Patterns = (), exclude: Patterns = ()) -> str:
  """Returns the arguments in words: `select='blocks', exclude='head'`."""
  patterns = "".join(f", {n}={given!r}" for n, given in (("include", include), ("exclude", exclude)) if given)
  return f"select={select!r}{patterns}"


def _matched(argument: str, patterns: Patterns, names: Sequence[str]) -> set[str]:
  """Returns which of `names` a pattern matches; the errors name the argument that has the patterns."""
  several = [patterns] if isinstance(patterns, str) else patterns
  if not isinstance(several, Sequence) or not all(isinstance(pattern, str) and pattern for pattern in several):
    raise InputError(f"{argument} must be a glob such as 'encoder/*', or a sequence of globs, got {shown(patterns)}.")
  found = set()
  for pattern in several:
    matched = {name for name in names if _matches(pattern, name)}
    if not matched and names:
      near = difflib.get_close_matches(pattern, names, 5, cutoff=0.3) or list(names[:5])
      raise InputError(
        f"{argument} must match names of groups that can be cut, got {shown(pattern)}, which matches none of"
        f" {len(names)}; close are {', '.join(near)}."
      )
    found |= matched
  return found


def _matches(pattern: str, name: str) -> bool:
  """Returns whether the pattern is of this name, or of a module that it lies in."""
  parts = name.split("/")
  places = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
  return pattern in places or any(fnmatch.fnmatchcase(place, pattern) for place in places)
