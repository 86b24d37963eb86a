"""Crops by hand, and both recipes against torchvision's algorithms as documented, written again here with Pillow."""

import io
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sapr_jax.data import EvaluationRecipe, TrainingRecipe, recipe as recipes
from sapr_jax.data.recipe import Crop, random_resized_crop, resized_size

pytest.importorskip("cv2", reason="needs OpenCV: pip install 'sapr_jax[imagenet]'")
pytest.importorskip("simplejpeg", reason="needs simplejpeg: pip install 'sapr_jax[imagenet]'")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def bits(seed):
  return np.random.PCG64(seed)


def noise(height, width, seed=0):
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image, file_format="png", **options):
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def reference_crop(height, width, draws, scale, ratio):
  """torchvision.transforms.RandomResizedCrop.get_params, with four draws an attempt."""
  draws = iter(draws)
  uniform = lambda low, high: low + (high - low) * next(draws)  # noqa: E731
  for _ in range(10):
    target_area = height * width * uniform(*scale)
    aspect_ratio = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = round(math.sqrt(target_area * aspect_ratio))
    h = round(math.sqrt(target_area / aspect_ratio))
    i, j = math.floor(uniform(0, height - h + 1)), math.floor(uniform(0, width - w + 1))
    if 0 < w <= width and 0 < h <= height:
      return i, j, h, w
  in_ratio = width / height
  if in_ratio < min(ratio):
    w, h = width, round(width / min(ratio))
  elif in_ratio > max(ratio):
    h, w = height, round(height * max(ratio))
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


def reference_evaluation(image, resize, size):
  """torchvision.transforms.Resize(resize), then CenterCrop(size), on a Pillow image."""
  width, height = image.size
  short, long = (width, height) if width <= height else (height, width)
  new_short, new_long = resize, int(resize * long / short)
  image = image.resize((new_short, new_long) if width <= height else (new_long, new_short), Image.BILINEAR)
  width, height = image.size
  top, left = round((height - size) / 2.0), round((width - size) / 2.0)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def test_crops_by_hand():
  half = np.full(40, 0.5)
  # Half of 20,000 pixels as a square is 100 x 100, in the middle of 101 places across and 1 down.
  assert random_resized_crop(100, 200, half, (0.5, 0.5), (1.0, 1.0)) == Crop(0, 50, 100, 100)
  # A quarter of 100 x 100 with width / height 4: 100 wide and 25 high, at place 38 of 76.
  assert random_resized_crop(100, 100, half, (0.25, 0.25), (4.0, 4.0)) == Crop(38, 0, 25, 100)
  assert random_resized_crop(1, 1, half, SCALE, RATIO) == Crop(0, 0, 1, 1)


def test_the_first_attempt_that_fits_is_taken():
  # The whole area at ratio 4/3 does not fit into a square; a quarter of it, as a square, does.
  draws = np.tile([1.0, 1.0, 0.0, 0.0], 10)
  draws[8:12] = [(0.25 - 0.08) / 0.92, 0.5, 0.0, 0.999]
  assert random_resized_crop(64, 64, draws, SCALE, RATIO) == Crop(0, 32, 32, 32)


def test_images_too_long_for_any_attempt_are_cropped_in_the_middle():
  whole = np.ones(40)
  assert random_resized_crop(10, 100, whole, (1.0, 1.0), RATIO) == Crop(0, 43, 10, 13)
  assert random_resized_crop(100, 10, whole, (1.0, 1.0), RATIO) == Crop(43, 0, 13, 10)
  assert random_resized_crop(64, 64, whole, (1.0, 1.0), RATIO) == Crop(0, 0, 64, 64)


def test_crops_equal_the_reference_on_many_sizes():
  generator = np.random.default_rng(0)
  for _ in range(2000):
    height, width = np.exp(generator.uniform(0, 8, 2)).astype(int).tolist()
    draws = generator.uniform(size=40)
    crop = random_resized_crop(height, width, draws, SCALE, RATIO)
    assert crop == reference_crop(height, width, draws.tolist(), SCALE, RATIO)
    assert 0 <= crop.top <= height - crop.height and 0 <= crop.left <= width - crop.width


def test_area_and_ratio_of_crops_are_distributed_as_documented():
  crops = [
    random_resized_crop(1000, 1000, draws, (0.1, 0.5), RATIO) for draws in np.random.default_rng(1).random((4000, 40))
  ]
  areas = np.array([crop.height * crop.width for crop in crops]) / 1e6
  logs = np.log([crop.width / crop.height for crop in crops])
  np.testing.assert_allclose([areas.min(), areas.mean(), areas.max()], [0.1, 0.3, 0.5], atol=0.01)
  np.testing.assert_allclose([logs.min(), logs.mean(), logs.max()], [-math.log(4 / 3), 0, math.log(4 / 3)], atol=0.02)


def test_training_gives_the_pixels_of_the_crop_mirrored_half_of_the_time():
  image = noise(8, 8)
  pixels = np.asarray(image)
  recipe = TrainingRecipe(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
  results = [recipe(encode(image), "a", bits(seed)) for seed in range(400)]
  assert {(result.shape, result.dtype) for result in results} == {((8, 8, 3), np.dtype(np.uint8))}
  mirrored = sum(np.array_equal(result, pixels[:, ::-1]) for result in results)
  assert sum(np.array_equal(result, pixels) for result in results) == 400 - mirrored
  assert 160 < mirrored < 240
  unmirrored = TrainingRecipe(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
  assert all(np.array_equal(unmirrored(encode(image), "a", bits(seed)), pixels) for seed in range(10))


def test_training_resizes_the_chosen_crop():
  import cv2

  image, recipe = noise(50, 70), TrainingRecipe(size=16, flip=False)
  for seed in range(20):
    draws = (bits(seed).random_raw(41) >> np.uint64(11)) * 2.0**-53
    top, left, height, width = reference_crop(50, 70, draws[1:].tolist(), SCALE, RATIO)
    expected = cv2.resize(np.asarray(image)[top : top + height, left : left + width], (16, 16))
    assert np.array_equal(recipe(encode(image), "a", bits(seed)), expected)


def test_the_random_numbers_are_the_same_on_every_platform():
  draws = recipes._uniform(np.random.PCG64(np.random.SeedSequence([0, 1, 2, 3])), 41)
  assert random_resized_crop(375, 500, draws[1:], SCALE, RATIO) == Crop(top=32, left=117, height=301, width=364)


def test_the_decoder_reduces_by_a_power_of_two_that_keeps_the_crop_large_enough():
  recipe = TrainingRecipe(size=100)
  sides = {1: (99, 100, 199), 2: (200, 399), 4: (400, 799), 8: (800, 1600, 5000)}
  for reduction, values in sides.items():
    for side in values:
      assert recipe._reduction(Crop(0, 0, side, 9000)) == recipe._reduction(Crop(0, 0, 9000, side)) == reduction


@pytest.mark.parametrize("seed", range(8))
def test_reduced_decoding_shows_the_same_crop(seed, monkeypatch):
  rows, columns = np.mgrid[:901, :1203]
  waves = [np.sin(rows / 61), np.cos(columns / 47), np.sin((rows + columns) / 83)]
  image = Image.fromarray((np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8))
  encoded, recipe = encode(image, "jpeg", quality=95), TrainingRecipe(size=64, scale=(0.3, 1.0))
  reduced = recipe(encoded, "a", bits(seed)).astype(int)
  monkeypatch.setattr(recipes, "_MAX_REDUCTION", 1)
  full = recipe(encoded, "a", bits(seed)).astype(int)
  # Half a pixel at most by rounding the crop, while another crop would differ by tens.
  assert 0 < np.abs(reduced - full).mean() < 5


def test_sizes_of_resized_images_by_hand():
  assert resized_size(375, 500, 256) == (256, 341)  # 341.33
  assert resized_size(500, 375, 256) == (341, 256)
  assert resized_size(10, 10, 256) == (256, 256)
  assert resized_size(300, 299, 8) == (8, 8)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (33, 33), (16, 16), (7, 90), (300, 41), (17, 16), (201, 302)])
@pytest.mark.parametrize("file_format", ["png", "jpeg"])
def test_evaluation_equals_the_reference_bit_for_bit(shape, file_format):
  encoded = encode(noise(*shape), file_format)
  expected = reference_evaluation(Image.open(io.BytesIO(encoded)), 16, 13)
  assert np.array_equal(EvaluationRecipe(size=13, resize=16)(encoded, "a", bits(0)), expected)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory):
  """Forty real ImageNet images, as bytes."""
  default = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample.tar"
  path = Path(os.environ.get("SAPR_IMAGENET_SAMPLE", default))
  if not path.is_file():
    pytest.skip(f"needs real images in a tar file: {path}; name another in SAPR_IMAGENET_SAMPLE")
  with tarfile.open(path) as tar:
    members = [member for member in tar if member.isfile()][:40]
    return [tar.extractfile(member).read() for member in members]


def test_evaluation_of_real_images_equals_the_reference_bit_for_bit(real_files):
  recipe = EvaluationRecipe()
  for encoded in real_files:
    expected = reference_evaluation(Image.open(io.BytesIO(encoded)).convert("RGB"), 256, 224)
    assert np.array_equal(recipe(encoded, "a", bits(0)), expected)


def test_training_on_real_images_is_close_to_pillow(real_files):
  recipe, differences = TrainingRecipe(flip=False), []
  for seed, encoded in enumerate(real_files):
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    draws = recipes._uniform(bits(seed), 41)[1:].tolist()
    top, left, height, width = reference_crop(image.height, image.width, draws, SCALE, RATIO)
    expected = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.BILINEAR)
    differences.append(np.abs(recipe(encoded, "a", bits(seed)).astype(int) - np.asarray(expected)).mean())
  assert np.mean(differences) < 5
