"""What the ImageNet experiments share: ResNet schedules of supplement A, images streamed from tensorflow-datasets.

tensorflow-datasets cannot download ImageNet: get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org
and put them in `~/tensorflow_datasets/downloads/manual`; it prepares them once, which needs TensorFlow. Or name a
folder of images, `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`:

    --config.data.source=folder --config.data.path=DIR
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default.get_config()
  config.model.name = "resnet50"
  config.eval_batch_size = 256

  config.data.name = "imagenet2012"
  config.data.stream = True
  config.data.image_size = 224
  config.data.eval_resize = 256
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)

  config.train.epochs = 90
  config.train.batch_size = 256
  config.train.learning_rate = 0.1
  config.train.decay_epochs = (30, 60)  # 0.1, 0.01, 0.001
  config.train.momentum = 0.9
  config.train.weight_decay = 1e-4

  config.prune.start_epoch = 18
  config.prune.gamma = 5e-4  # supplement C
  config.generator.batch_size = 256

  config.finetune.epochs = 100
  config.finetune.batch_size = 256
  config.finetune.learning_rate = 0.1
  config.finetune.decay_epochs = (30, 60, 90)  # as in training, and 0.0001 in the last ten epochs
  config.finetune.momentum = 0.9
  config.finetune.weight_decay = 1e-4

  config.checkpoint.every_steps = 1000  # an epoch has 5,004
  config.report.latency_batch_sizes = (1, 64)

  config.evaluate.every_epochs = 5  # dense and sub-network, each of which adds some percent to an epoch
  return config
