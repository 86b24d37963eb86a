"""A small ResNet on scikit-learn's handwritten digits: the whole method in short.

    python -m sapr_jax.main --config configs/digits.py --workdir runs/digits

The images are real (8x8 pixels, 1,197 for training and 600 for testing) and come with scikit-learn. Expect about
99 % for the dense network and for the one with half the MACs.

Time: about a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default.get_config()
  config.model.name = "resnet8"
  config.data.source = "digits"
  config.data.crop_padding = 1
  config.data.flip = False  # a mirrored digit is another sign
  config.eval_batch_size = 304

  config.train.epochs = 30
  config.train.batch_size = 64
  config.train.decay_epochs = (20, 26)

  config.prune.p = 0.49  # of the layers that can be pruned: half of the whole network
  config.prune.start_epoch = 6
  config.prune.gamma = 1.5e-2  # a short run: a dropped channel must lose its norm in 400 steps
  config.prune.min_width = 2

  config.generator.data_share = 0.5
  config.generator.batch_size = 64
  config.generator.learning_rate = 5e-3

  config.finetune.epochs = 12
  config.finetune.batch_size = 64
  config.finetune.learning_rate = 0.05
  config.finetune.decay_epochs = (7, 10)
  return config
