"""ResNet-101 on ImageNet: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/resnet101_imagenet.py --workdir runs/resnet101

Sized for one accelerator with 80 GB, or several with less: the batch of 256 is shared among them. Keeps 44.6 % of
7,801 M MACs. No figure to compare with was available.
`configs/default_imagenet.py` says where the images come from.

Time: not measured; computed, at least 2.6 hours on 8 A100 (docs/scaling.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default_imagenet.get_config()
  config.model.name = "resnet101"
  config.prune.p = 0.41
  return config
