"""A pretrained ResNet-50 on ImageNet: torchvision's network is cut to half of its MACs and fine-tuned.

    python -m sapr_jax.main --config configs/resnet50_pretrained_imagenet.py --workdir runs/resnet50_pretrained \\
      --config.init.weights=resnet50.safetensors

The weights are those of `torchvision.models.resnet50(weights="IMAGENET1K_V1")` (76.13 % top-1), as a file of
safetensors or of `torch.save` (docs/torch.md); "resnet34", "resnet101" and "mobilenetv2" by `--config.model.name`.
`configs/default_imagenet.py` says where the images come from, and what the network saw of them.

The channels that the norms of the weights can do without are cut at once, the weights that stay are fitted to make up
for them, and 60 epochs of fine-tuning follow. That was best on CIFAR-10 (`configs/resnet20_pretrained_cifar10.py`); on
ImageNet it has not been tried. By the computed step of docs/scaling.md an epoch takes 19 s. To choose a setting,
leave the validation images alone: `--config.data.validation_images=50000`.

Time: not measured; computed, at least 0.3 hours on 8 A100 (docs/scaling.md).
"""

from ml_collections import ConfigDict

from sapr_jax.configs import default_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = default_imagenet.get_config()
  config.model.name = "resnet50"

  config.train.epochs = 0
  config.train.decay_epochs = ()

  config.prune.proposer = "l2_norm"
  config.prune.cost = "macs"
  config.prune.p = 0.5
  config.prune.start_epoch = 0
  config.prune.compensation_batches = 50

  config.finetune.epochs = 60
  config.finetune.learning_rate = 0.02
  config.finetune.schedule = "cosine"
  config.finetune.decay_epochs = ()
  return config
