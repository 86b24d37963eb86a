"""A small vision transformer on CIFAR-10: its attention heads, the widths of their values, and its hidden units.

    python -m sapr_jax.main --config configs/vit_tiny_cifar10.py --workdir runs/vit_tiny

The generator decides how many heads and units each block keeps, and the norms of their weights which. The optimizer is
AdamW, after which the partial regularization shrinks what is to go: a penalty in the loss would be rescaled by it. What
was measured, on a part of the images, is in docs/experiments.md.

Sized for a CPU.

Time: about ten hours on two CPU cores, from epochs of 2,000 images.
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default.get_config()
  config.model.name = "vit_tiny"

  for phase in (config.train, config.finetune):
    phase.optimizer = "adamw"
    phase.learning_rate = 1e-3
    phase.weight_decay = 0.05
    phase.weight_decay_of = "kernels"
    phase.schedule = "cosine"
    phase.decay_epochs = ()
  config.train.epochs = 60
  config.train.warmup_epochs = 3.0
  config.finetune.epochs = 30

  config.prune.p = 0.5
  config.prune.start_epoch = 30
  config.prune.form = "proximal"
  config.prune.shrinkage = 4.0
  config.search.end_epoch = 45

  config.generator.order = "l2_norm"
  config.generator.learning_rate = 1e-2
  return config
