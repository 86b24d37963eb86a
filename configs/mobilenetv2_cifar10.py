"""MobileNet-V2 on CIFAR-10: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/mobilenetv2_cifar10.py --workdir runs/mobilenetv2_cifar10

or, with a folder of images, `train/<class>/*` and `test/<class>/*`, in place of tensorflow-datasets:

    python -m sapr_jax.main --config configs/mobilenetv2_cifar10.py --workdir runs/mobilenetv2_cifar10 \\
      --config.data.source=folder --config.data.path=DIR

Sized for one GPU. Keeps 58.3 % of 88.0 M MACs. Published for this method: 94.52 -> 94.97 % with about 54 % of the MACs,
of a MobileNet-V2 whose adaptation to 32x32 pixels is not described; ours has stem and first down-sampling at stride 1.

Time: about four days on two CPU cores, by the measured step (docs/performance.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration; the schedules are those of the default, as for ResNet-56."""
  config = default.get_config()
  config.model.name = "mobilenetv2_cifar"
  config.prune.p = 0.54
  config.prune.start_epoch = 40

  config.evaluate.every_epochs = 5  # dense and sub-network, each of which adds some percent to an epoch
  return config
