"""A pretrained ResNet-20 on CIFAR-10: the network that others trained is cut in half and fine-tuned.

    python -m sapr_jax.main --config configs/resnet20_pretrained_cifar10.py --workdir runs/resnet20_pretrained \\
      --config.init.weights=resnet20.th --config.data.source=folder --config.data.path=DIR

The weights are `resnet20-12fca82f.th` of github.com/akamaster/pytorch_resnet_cifar10 (91.73 % on the original test
images; reading them needs `pip install -e '.[torch]'`). Their network saw images normalized by ImageNet's mean and
deviation. DIR has `train/<class>/*` and `test/<class>/*`; without it the images come from tensorflow-datasets.

The norms of the weights choose: every layer keeps a share of its channels, a smaller one where images are larger, as
its parameters cost more there. The others are cut at once, the weights that stay are fitted to make up for them, and
twelve epochs of fine-tuning follow, in which the network adapts, too, to images that may differ from those that it was
trained on, such as a JPEG copy of them. On test images that was at least as good as to spend some of the epochs on
training with the regularization before the cut (docs/method.md). To choose a setting, leave the test images alone:
`--config.data.validation_images=5000`.

Sized for a CPU.

Time: about half an hour on two CPU cores, by the measured step (docs/performance.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default


def get_config() -> ConfigDict:
  """Returns the configuration; docs/method.md has what the choices were compared with."""
  config = default.get_config()
  config.model.name = "resnet20"
  config.data.mean = (0.485, 0.456, 0.406)  # as the network was trained
  config.data.std = (0.229, 0.224, 0.225)

  config.train.epochs = 0
  config.train.batch_size = 64
  config.train.decay_epochs = ()

  config.prune.proposer = "l2_norm"
  config.prune.p = 0.5
  config.prune.start_epoch = 0
  config.prune.compensation_batches = 50

  config.finetune.epochs = 12
  config.finetune.batch_size = 64
  config.finetune.learning_rate = 0.02
  config.finetune.schedule = "cosine"
  config.finetune.decay_epochs = ()
  config.finetune.weight_decay = 5e-4
  return config
