"""ResNet-34 on ImageNet: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/resnet34_imagenet.py --workdir runs/resnet34

Sized for one accelerator with 24 GB, or several with less: the batch of 256 is shared among them. Keeps 55.7 % of
3,664 M MACs. To compare with, another method (ATO, CVPR 2024, last epoch): 73.31 -> 72.78 % top-1 with 55.9 % of the
MACs; the paper's own figure was not available.
`configs/default_imagenet.py` says where the images come from.

Time: not measured; computed, at least 1.3 hours on 8 A100 (docs/scaling.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default_imagenet.get_config()
  config.model.name = "resnet34"
  config.prune.p = 0.54
  return config
