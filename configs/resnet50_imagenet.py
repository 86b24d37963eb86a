"""ResNet-50 on ImageNet: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/resnet50_imagenet.py --workdir runs/resnet50

Sized for one accelerator with 40 GB, or several with less: the batch of 256 is shared among them. Keeps 44.4 % of
4,089 M MACs. To compare with, another method (ATO, CVPR 2024): 76.13 -> 76.37 % top-1 with 44.1 % of the MACs; the
paper's own figure was not available.
`configs/default_imagenet.py` says where the images come from.

Time: not measured; computed, at least 1.4 hours on 8 A100 (docs/scaling.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default_imagenet.get_config()
  config.model.name = "resnet50"
  config.prune.p = 0.37
  return config
