"""Settings of a `Pruner`'s search: who chooses the channels, and when."""

from __future__ import annotations

import dataclasses
from typing import Any

from sapr_jax.checks import check_integer, check_number, check_type, shown
from sapr_jax.errors import InputError
from sapr_jax.method.importance import COMPARISONS, IMPORTANCES


@dataclasses.dataclass(frozen=True)
class GeneratorOptions:
  """Settings of the paper's architecture generator, which learns how many channels each group needs.

  Attributes:
    learning_rate: Of AdamW. A search of few steps needs more than the default: 1e-2 for some hundred.
    weight_decay: Of AdamW.
    budget_weight: lambda, the weight of the budget in its loss.
    bias: b of Eq. 1.
    temperature: tau of Eq. 1.
    prior: An importance with which it begins, compared as `Search` says; None for the paper's random start.
    prior_strength: How firmly it holds to that, see `outputs_of_prior`.
    order: An importance that says which channels fill the widths; None leaves that to the generator too.

  References:
    Gao et al., ICCV 2023, supplement A.
  """

  learning_rate: float = 1e-3
  weight_decay: float = 1e-2
  budget_weight: float = 4.0
  bias: float = 3.0
  temperature: float = 0.4
  prior: str | None = None
  prior_strength: float = 4.0
  order: str | None = "l2_norm"

  def __post_init__(self) -> None:
    for name, must, is_good in (
      ("learning_rate", "a number above 0", lambda x: x > 0),
      ("weight_decay", "a number of at least 0", lambda x: x >= 0),
      ("budget_weight", "a number of at least 0", lambda x: x >= 0),
      ("bias", "a number", lambda x: True),
      ("temperature", "a number above 0", lambda x: x > 0),
      ("prior_strength", "a number above 0", lambda x: x > 0),
    ):
      check_number(name, getattr(self, name), must, is_good)
    for name in ("prior", "order"):
      if (value := getattr(self, name)) is not None:
        _check_name(name, value, [known for known in IMPORTANCES if known != "taylor"])


@dataclasses.dataclass(frozen=True)
class Search:
  """Who chooses the channels, and when. Epochs are counted from 0, by the calls of `Pruner.update`.

  The default is for a network that is trained already: the norms of the weights choose once, before the first epoch. Of
  all that was tried on one (docs/method.md) only widths of a generator that cost more time were as good. For a network
  that is trained from scratch let `start` be a fifth of the epochs: the norms of random weights mean nothing.

  Attributes:
    start: The epoch from which on channels are chosen.
    end: The epoch from which on masks stay as they are. None: an importance chooses once, at `start`, and a generator
      learns to the end.
    in_force: The epoch from which on masks are in force, so that a generator can learn before it counts; None: `start`.
    importance: A name in `IMPORTANCES`; not used with a generator.
    compare: "equal_shares" lets all groups keep the same share of their channels but for the cost, "group_mean" lets
      channels compete by their ratio to the mean of their group.
    cost_exponent: These shares or ratios are divided by this power of what a parameter of the group costs, so that
      cheap ones are kept rather: with 0.5, a convolution on images of twice the side, whose parameters cost four times
      the MACs, keeps half the share.
    min_width: Channels that every group keeps.
    round_to: Widths are multiples of this; None: what suits the platform and the network, see `default_round_to`.
    generator: Settings of the paper's generator, which then chooses in the place of the importance.
  """

  start: int = 0
  end: int | None = None
  in_force: int | None = None
  importance: str = "l2_norm"
  compare: str = "equal_shares"
  cost_exponent: float = 0.375
  min_width: int = 1
  round_to: int | None = None
  generator: GeneratorOptions | None = None

  def __post_init__(self) -> None:
    check_integer("start", self.start, 0)
    check_integer("min_width", self.min_width, 1)
    if self.round_to is not None:
      check_integer("round_to", self.round_to, 1)
    check_number("cost_exponent", self.cost_exponent, "a number of at least 0", lambda x: x >= 0)
    _check_name("importance", self.importance, IMPORTANCES)
    _check_name("compare", self.compare, COMPARISONS)
    if self.generator is not None:
      check_type("generator", self.generator, GeneratorOptions, "GeneratorOptions() has the paper's settings")
    if self.end is not None:
      check_integer("end", self.end, self.start + 1)
    if self.in_force is not None:
      check_integer("in_force", self.in_force, self.start)
      if not self.is_on(self.in_force):
        raise InputError(
          f"in_force must be an epoch of the search, below end={self._end}, got {self.in_force}; raise end or lower it."
        )

  @property
  def first_in_force(self) -> int:
    """The epoch in which masks come into force."""
    return self.start if self.in_force is None else self.in_force

  @property
  def _end(self) -> int | None:
    return self.start + 1 if self.end is None and self.generator is None else self.end

  def is_on(self, epoch: int) -> bool:
    """Returns whether channels are chosen before this epoch."""
    return self.start <= epoch and (self._end is None or epoch < self._end)

  def is_in_force(self, epoch: int) -> bool:
    """Returns whether masks that are chosen before this epoch come into force."""
    return epoch >= self.first_in_force


def _check_name(name: str, value: Any, known: Any) -> None:
  if not isinstance(value, str) or value not in known:
    raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}.")
