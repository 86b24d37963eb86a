"""Image data: where it comes from, in which order it is read, and how it is augmented."""

from sapr_jax.data.augment import augment, normalize, random_crop, random_flip
from sapr_jax.data.dataset import ImageDataset, ImageSplit, subset
from sapr_jax.data.loading import SOURCES, load_dataset
from sapr_jax.data.order import epoch_batches, epoch_order, evaluation_batches

__all__ = [
  "SOURCES",
  "ImageDataset",
  "ImageSplit",
  "augment",
  "epoch_batches",
  "epoch_order",
  "evaluation_batches",
  "load_dataset",
  "normalize",
  "random_crop",
  "random_flip",
  "subset",
]
