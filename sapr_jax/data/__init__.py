"""Image data: where it comes from, in which order it is read, and how it is augmented."""

from sapr_jax.data.augment import augment, normalize, random_crop, random_flip
from sapr_jax.data.dataset import DataSpec, EncodedDataset, EncodedSource, ImageDataset, ImageSplit, subset
from sapr_jax.data.decoding import BrokenImageError, decode_exactly, too_many_broken
from sapr_jax.data.fingerprint import fingerprint
from sapr_jax.data.inputs import Inputs
from sapr_jax.data.order import epoch_batches, epoch_order, evaluation_batches
from sapr_jax.data.recipe import EvaluationRecipe, Recipe, TrainingRecipe
from sapr_jax.data.sources import SOURCES, load_dataset, open_dataset, open_split
from sapr_jax.data.stream import stream_batches

__all__ = [
  "SOURCES",
  "BrokenImageError",
  "DataSpec",
  "EncodedDataset",
  "EncodedSource",
  "EvaluationRecipe",
  "ImageDataset",
  "ImageSplit",
  "Inputs",
  "Recipe",
  "TrainingRecipe",
  "augment",
  "decode_exactly",
  "epoch_batches",
  "epoch_order",
  "evaluation_batches",
  "fingerprint",
  "load_dataset",
  "normalize",
  "open_dataset",
  "open_split",
  "random_crop",
  "random_flip",
  "stream_batches",
  "subset",
  "too_many_broken",
]
