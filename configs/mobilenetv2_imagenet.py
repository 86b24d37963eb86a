"""MobileNet-V2 on ImageNet: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/mobilenetv2_imagenet.py --workdir runs/mobilenetv2

Sized for one accelerator with 40 GB, or several with less: the batch of 256 is shared among them. Keeps 69.9 % of 301 M
MACs. Published for this method: 71.91 -> 72.05 % top-1 with about 71 % of the MACs. `configs/default_imagenet.py` says
where the images come from.

Time: not measured; computed, at least 0.6 hours on 8 A100 (docs/scaling.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default_imagenet.get_config()
  config.model.name = "mobilenetv2"
  config.train.epochs = 150
  for phase in (config.train, config.finetune):  # fine-tuning takes 100 epochs
    phase.schedule = "cosine"
    phase.learning_rate = 0.045
    phase.weight_decay = 4e-5
    phase.decay_epochs = ()
  config.prune.p = 0.65
  config.prune.start_epoch = 30
  return config
