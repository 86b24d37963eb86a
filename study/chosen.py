"""Hyperparameters of the rows of the size "pretrained", chosen on held-out training images and then fixed.

They were compared with two seeds that no row has, 100 and 101, on `data.validation_images`; the test images had no part
in it. No seed is added after the runs on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EPOCHS = 8
"""Of every row, training and fine-tuning together."""

SCHEDULE: Mapping[str, Any] = {
  "train.epochs": 2,
  "train.learning_rate": 0.02,
  "prune.start_epoch": 0,
  "prune.shrinkage": 4.0,
  "search.end_epoch": 1,
  "generator.data_share": 0.4,  # 125 steps
  "finetune.epochs": EPOCHS - 2,
  "finetune.learning_rate": 0.05,
}
"""What all rows share."""

STRENGTHS = (1.0,)
"""Of Torch-Pruning's sparse learning, as multiples of its recipe's."""

PRIOR: Mapping[str, Any] = {
  "generator.prior": "l2_norm",
  "generator.prior_strength": 4.0,
  "generator.learning_rate": 3e-3,
}
"""Of the generator that begins with the norms of the channels."""

UNTRAINED: Mapping[str, Any] = {"generator.learning_rate": 1e-9}
"""Of a generator that learns nothing, whose widths are random: what its learning is worth."""

PAPERS: Mapping[str, Any] = {
  "generator.order": None,
  "generator.learning_rate": 1e-3,
  "generator.data_share": 0.1,
  "search.end_epoch": None,
}
"""Of the generator as the paper has it, with masks that are renewed in every epoch."""

DISTILLED: Mapping[str, Any] = {
  **{f"{phase}.distillation.weight": 0.5 for phase in ("train", "finetune")},
  **{f"{phase}.distillation.temperature": 2.0 for phase in ("train", "finetune")},
}
"""Of the rows with distillation."""

CANDIDATES: Mapping[str, Mapping[str, Any]] = {
  "shrinkage=2": {"prune.shrinkage": 2.0},
  "shrinkage=8": {"prune.shrinkage": 8.0},
  "epochs=1": {"train.epochs": 1, "finetune.epochs": EPOCHS - 1},
  "epochs=4": {"train.epochs": 4, "finetune.epochs": EPOCHS - 4},
  "finetune_rate=0.02": {"finetune.learning_rate": 0.02},
  "finetune_rate=0.1": {"finetune.learning_rate": 0.1},
}
"""Name -> fields that were compared with those of `SCHEDULE`, for the method and for fixed masks alike."""

CANDIDATE_STRENGTHS = (0.1, 0.3, 1.0, 3.0)
"""Compared for `STRENGTHS`."""
