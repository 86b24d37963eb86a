"""From the bytes of an image file to its pixels: fast for the usual JPEG, through Pillow for all else."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from sapr_jax.data import jpeg
from sapr_jax.data.dataset import EncodedDataset, ImageDataset, ImageSplit
from sapr_jax.errors import InputError, one_line

if TYPE_CHECKING:
  from PIL import Image

_GRAYSCALE_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
# Pillow could read more, but some of that is a program: it gives PostScript to an interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")
# What libjpeg itself turns into RGB; CMYK is left to Pillow, which knows of Adobe's inverted kind.
_FAST_COLOURSPACES = frozenset({"YCbCr", "RGB", "Gray"})


class BrokenImageError(InputError):
  """An image file whose content is damaged: it does not decode, or pixels are missing."""


def image_size(encoded: bytes, name: str) -> tuple[int, int]:
  """Reads `(height, width)` of an image from its header; see `decode_exactly` for the rest."""
  if (header := _fast_header(encoded, name)) is not None:
    return header[:2]
  width, height = _open(encoded, name).size
  return height, width


def decode_quickly(encoded: bytes, name: str, reduction: int = 1) -> np.ndarray:
  """Decodes an image to uint8 `[H, W, 3]` with the fast, slightly coarser methods of libjpeg where it can.

  A `reduction` of 2, 4 or 8 divides both sides, rounded up, which costs less. Only JPEG can; others come in full size.
  See `decode_exactly` for the rest.
  """
  if (header := _fast_header(encoded, name)) is not None:
    height, width = (-(-side // reduction) for side in header[:2]) if reduction > 1 else (0, 0)
    options = {"fastdct": True, "fastupsample": True, "min_height": height, "min_width": width}
    if (pixels := _decode_jpeg(encoded, name, **options)) is not None:
      return pixels
  return np.asarray(decode_exactly(encoded, name)[0])


def decode_exactly(encoded: bytes, name: str) -> tuple[Image.Image, bool]:
  """Decodes an image file to the pixels that Pillow gives.

  An alpha channel is dropped, and an EXIF orientation ignored, as torchvision does.

  Returns:
    The image in mode "RGB", and whether it is stored as grayscale.

  Raises:
    BrokenImageError: If the image is broken; the message has `name`.
    InputError: If it has more than 8 bits a channel or too many pixels; likewise.
  """
  from PIL import Image

  if (header := _fast_header(encoded, name)) is not None and (pixels := _decode_jpeg(encoded, name)) is not None:
    return Image.fromarray(pixels), header[2] == "Gray"
  image = _open(encoded, name)
  if header is None and jpeg.is_jpeg(encoded):
    _decode_jpeg(encoded, name)  # for what it says about missing pixels
  mode = image.mode
  if mode not in _GRAYSCALE_MODES and mode not in _COLOUR_MODES:
    raise InputError(f"image {name!r} has pixels of Pillow mode {mode!r}; expected 8 bits a channel, so convert it")
  try:
    if isinstance(image.info.get("transparency"), bytes):
      image = image.convert("RGBA")  # The way from a palette with alpha that Pillow does not warn about.
    image.load()
    return (image if image.mode == "RGB" else image.convert("RGB")), mode in _GRAYSCALE_MODES
  except Exception as error:  # Each decoder of Pillow raises what it likes on a broken file.
    raise _broken(name, error) from error


def decode_dataset(files: EncodedDataset, skip_broken: int = 0) -> ImageDataset:
  """Decodes every image of a set into memory, with one channel if every one is stored as grayscale, else with three.

  One thread: Pillow holds the interpreter lock for most of the time that a small image takes, so that more threads make
  32x32 images slower, not faster.

  Raises:
    InputError: If more than `skip_broken` images are broken, or one cannot be read or has another size than the first;
      the message names the image. Or if a split has no image, or one without a label.
  """
  sizes = [len(files.train), len(files.test)]
  images: np.ndarray | None = None
  first, all_grayscale = "", True
  labels = np.empty(sum(sizes), np.int32)
  broken: dict[int, str] = {}
  for place in range(len(labels)):
    encoded, labels[place], name = files.train[place] if place < sizes[0] else files.test[place - sizes[0]]
    try:
      image, is_grayscale = decode_exactly(encoded, name)
    except BrokenImageError as error:
      if not skip_broken:
        raise
      broken[place] = str(error)
      continue
    if images is None:
      first, images = name, np.empty((len(labels), image.height, image.width, 3), np.uint8)
    if (image.height, image.width) != images.shape[1:3]:
      raise InputError(
        f"image {name!r} is {image.height}x{image.width} but the first image, {first!r}, is "
        f"{images.shape[1]}x{images.shape[2]} (height x width); expected images of one size"
      )
    images[place] = image
    all_grayscale &= is_grayscale
  if len(broken) > skip_broken:
    raise too_many_broken(broken.values(), skip_broken)
  whole = [np.setdiff1d(np.arange(size) + start, [*broken]) for start, size in ((0, sizes[0]), (sizes[0], sizes[1]))]
  if images is None or not all(map(len, whole)):
    raise InputError(
      f"the splits of {files.name!r} hold {len(whole[0])} and {len(whole[1])} images; expected at least one each"
    )
  if labels.min() < 0:
    raise InputError(f"images of {files.name!r} have no label; expected splits that are labelled")
  if all_grayscale:
    images = np.ascontiguousarray(images[..., :1])
  parts = whole if broken else [slice(sizes[0]), slice(sizes[0], None)]  # without a copy where it can be
  train, test = (ImageSplit(images[part], labels[part]) for part in parts)
  by_split = {
    "train": {place: problem for place, problem in broken.items() if place < sizes[0]},
    "test": {place - sizes[0]: problem for place, problem in broken.items() if place >= sizes[0]},
  }
  return ImageDataset(files.name, train, test, files.class_names, by_split)


def too_many_broken(problems: Collection[str], limit: int) -> InputError:
  """Returns the error to raise about more broken images than `limit`."""
  return InputError(
    f"{len(problems)} images are broken, more than the {limit} that skip_broken allows; the last of them: "
    f"{list(problems)[-1]}, or allow more with skip_broken"
  )


def _broken(name: str, error: Exception) -> BrokenImageError:
  return BrokenImageError(
    f"image {name!r} is broken ({one_line(error)}); expected a whole image file, so replace or remove it"
  )


def _open(encoded: bytes, name: str) -> Image.Image:
  """Reads the header of an image with Pillow."""
  from PIL import Image, UnidentifiedImageError

  try:
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
  except UnidentifiedImageError:
    raise _broken(name, ValueError(f"its content is none of {', '.join(_FORMATS)}")) from None
  except Exception as error:  # As above.
    raise _broken(name, error) from error
  _check_number_of_pixels(name, image.height, image.width)
  return image


def _fast_header(encoded: bytes, name: str) -> tuple[int, int, str] | None:
  """Returns height, width and colour space if the header is that of a JPEG that libjpeg turns into RGB, else None."""
  header = jpeg.read_header(encoded)
  if header is None or header[2] not in _FAST_COLOURSPACES:
    return None
  _check_number_of_pixels(name, *header[:2])
  return header


def _decode_jpeg(encoded: bytes, name: str, **options: Any) -> np.ndarray | None:
  """See `jpeg.decode`; an image without all of its pixels is broken."""
  try:
    return jpeg.decode(encoded, **options)
  except jpeg.MissingPixelsError as error:
    raise _broken(name, error) from error


def _check_number_of_pixels(name: str, height: int, width: int) -> None:
  """Refuses a decompression bomb: a small file that would fill the memory."""
  from PIL import Image

  limit = Image.MAX_IMAGE_PIXELS
  if limit is not None and height * width > limit:
    raise InputError(
      f"image {name!r} is {height}x{width} (height x width); expected at most the {limit} pixels that Pillow takes for "
      "harmless, so shrink or remove it"
    )
