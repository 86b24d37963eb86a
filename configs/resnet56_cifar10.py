"""ResNet-56 on CIFAR-10: Gao et al., ICCV 2023, supplement A and Table 1.

    python -m sapr_jax.main --config configs/resnet56_cifar10.py --workdir runs/resnet56

or, with a folder of images, `train/<class>/*` and `test/<class>/*`, in place of tensorflow-datasets:

    python -m sapr_jax.main --config configs/resnet56_cifar10.py --workdir runs/resnet56 \\
      --config.data.source=folder --config.data.path=DIR

Sized for one GPU. Keeps 48.2 % of 125.5 M MACs. Published for this method: 93.81 % after fine-tuning with 48.0 % of the
MACs.

Time: about 36 hours on two CPU cores, by the measured step (docs/performance.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration: the default is this experiment, which is here once more, number by number."""
  config = default.get_config()
  config.model.name = "resnet56"

  config.train.epochs = 200
  config.train.learning_rate = 0.1
  config.train.decay_epochs = (100, 150)  # 0.1, 0.01, 0.001
  config.train.momentum = 0.9
  config.train.weight_decay = 1e-4

  config.prune.p = 0.48
  config.prune.start_epoch = 40

  config.finetune.epochs = 160
  config.finetune.learning_rate = 0.1
  config.finetune.decay_epochs = (80, 120)

  config.evaluate.every_epochs = 5  # dense and sub-network, each of which adds some percent to an epoch
  return config
