"""Streamed batches: which images, the same ones however they are read, and nothing left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

import sapr_jax
from sapr_jax.data import (
  DataSpec,
  EvaluationRecipe,
  TrainingRecipe,
  epoch_batches,
  evaluation_batches,
  open_dataset,
  stream_batches,
)

for _package in ("cv2", "grain"):
  pytest.importorskip(_package, reason=f"needs {_package}: pip install 'sapr_jax[imagenet]'")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

RECIPE = TrainingRecipe(size=12)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Ten images of noise in each of two classes; those to evaluate on are filled with 8 times their number."""
  folder = tmp_path_factory.mktemp("noise")
  generator = np.random.default_rng(0)
  for class_number, class_name in enumerate(("a", "b")):
    for split in ("train", "val"):
      (folder / split / class_name).mkdir(parents=True)
    for number in range(10):
      pixels = generator.integers(0, 256, [*generator.integers(20, 60, 2).tolist(), 3], dtype=np.uint8)
      Image.fromarray(pixels).save(folder / "train" / class_name / f"{number}.JPEG")
      value = 8 * (10 * class_number + number)
      Image.new("RGB", (20, 30), (value, value, value)).save(folder / "val" / class_name / f"{number}.png")
  return folder


@pytest.fixture(scope="module")
def dataset(root):
  return open_dataset(DataSpec("folder", path=str(root)))


def read(split, order, **options):
  """All batches as two arrays."""
  options = {"recipe": RECIPE, "seed": 0, "purpose": 1, "epoch": 0} | options
  batches = list(stream_batches(split, order, **options))
  images = np.stack([batch["images"] for batch in batches])
  labels = np.stack([batch["labels"] for batch in batches])
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
  return images, labels


def assert_same(first, second):
  assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_evaluation_batches_hold_each_image_at_its_place(dataset):
  order, weights = evaluation_batches(20, 8)
  images, labels = read(dataset.test, order, recipe=EvaluationRecipe(size=6, resize=8))
  assert images.shape == (3, 8, 6, 6, 3)
  assert np.array_equal(images, np.broadcast_to(8 * order[..., None, None, None], images.shape))
  assert np.array_equal(labels, order // 10)
  assert weights.sum() == 20


def test_training_batches_depend_on_seed_purpose_epoch_and_position_alone(dataset):
  order = epoch_batches(20, 5, seed=0, epoch=0, purpose="weights")
  first = read(dataset.train, order)
  assert first[0].shape == (4, 5, 12, 12, 3)
  assert np.array_equal(first[1], order // 10)
  assert_same(first, read(dataset.train, order))
  for change in ({"seed": 1}, {"purpose": 2}, {"epoch": 1}):
    images, labels = read(dataset.train, order, **change)
    assert np.array_equal(labels, first[1])
    assert (images != first[0]).any(axis=(2, 3, 4)).mean() > 0.8
  twice, _ = read(dataset.train, np.full((1, 20), 3, np.int32))
  assert len(np.unique(twice[0].reshape(20, -1), axis=0)) > 15


def test_an_example_is_the_recipe_with_the_bits_of_its_position(dataset):
  order = np.array([[4, 7], [1, 19]], np.int32)
  images, _ = read(dataset.train, order, seed=5, purpose=6, epoch=7)
  for position, index in enumerate(order.ravel().tolist()):
    encoded, _, name = dataset.train[index]
    bits = np.random.PCG64(np.random.SeedSequence([5, 6, 7, position + 1]))
    assert np.array_equal(images.reshape(4, 12, 12, 3)[position], RECIPE(encoded, name, bits))


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_a_resumed_epoch_has_the_batches_that_remained(dataset, first):
  order = epoch_batches(20, 5, seed=0, epoch=0, purpose="weights")
  options = {"recipe": RECIPE, "seed": 0, "purpose": 1, "epoch": 0}
  whole = list(stream_batches(dataset.train, order, **options))
  rest = list(stream_batches(dataset.train, order, first=first, **options))
  assert len(rest) == 4 - first
  for batch, expected in zip(rest, whole[first:], strict=True):
    assert_same(batch.values(), expected.values())


@pytest.mark.parametrize("process_count", [2, 4])
def test_slices_of_the_processes_make_the_batch(dataset, process_count):
  order = epoch_batches(20, 8, seed=0, epoch=0, purpose="weights")
  options = {"process_count": process_count, "first": 1}
  slices = [read(dataset.train, order, process_index=index, **options) for index in range(process_count)]
  joined = [np.concatenate(parts, axis=1) for parts in zip(*slices, strict=True)]
  assert_same(joined, read(dataset.train, order, first=1))


def test_batches_larger_than_a_piece_are_put_together(dataset):
  order = np.random.default_rng(0).integers(0, 20, (3, 70)).astype(np.int32)
  images, labels = read(dataset.train, order)
  assert np.array_equal(labels, order // 10)
  # The same positions in batches of one piece.
  assert np.array_equal(read(dataset.train, order.reshape(-1, 21))[0].reshape(images.shape), images)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_end(dataset):
  order = np.random.default_rng(0).integers(0, 20, (3, 70)).astype(np.int32)
  assert_same(read(dataset.train, order, workers=2), read(dataset.train, order))
  assert active_children() == []


def test_closing_and_dropping_in_the_middle_end_the_threads(dataset):
  order = np.zeros((500, 5), np.int32)
  before = set(threading.enumerate())
  for end in (lambda batches: batches.close(), lambda batches: None):
    batches = stream_batches(dataset.train, order, recipe=RECIPE, seed=0, purpose=1, epoch=0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    end(batches)
    del batches
    for thread in started:
      thread.join(timeout=300)
      assert not thread.is_alive()


@pytest.mark.slow
def test_closing_in_the_middle_ends_the_workers_and_a_killed_worker_is_reported(dataset, refused):
  order = np.zeros((500, 5), np.int32)
  options = {"recipe": RECIPE, "seed": 0, "purpose": 1, "epoch": 0, "workers": 1}
  batches = stream_batches(dataset.train, order, **options)
  next(batches)
  assert len(active_children()) == 1
  batches.close()
  assert active_children() == []
  batches = stream_batches(dataset.train, order, **options)
  next(batches)
  active_children()[0].kill()
  with refused("was killed", "1 workers", "fewer"):
    list(batches)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_file_is_refused_by_name(tmp_path, refused, workers):
  for split in ("train", "val"):
    (tmp_path / split / "only").mkdir(parents=True)
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / split / "only" / "whole.JPEG")
  (tmp_path / "train" / "only" / "broken.JPEG").write_bytes(b"broken")
  split = open_dataset(DataSpec("folder", path=str(tmp_path))).train
  order = np.array([[1, 1], [1, 0]], np.int32)
  batches = stream_batches(split, order, recipe=RECIPE, seed=0, purpose=1, epoch=0, workers=workers)
  next(batches)
  with refused("is broken", str(tmp_path / "train" / "only" / "broken.JPEG"), "replace or remove it"):
    next(batches)
  assert active_children() == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_next_whole_image_stands_in_for_a_broken_one(tmp_path, refused, workers):
  for split in ("train", "val"):
    (tmp_path / split / "only").mkdir(parents=True)
    for number in range(6):
      Image.new("RGB", (20, 30), (40 * number,) * 3).save(tmp_path / split / "only" / f"{number}.png")
  for number in (1, 2, 5):
    (tmp_path / "val" / "only" / f"{number}.png").write_bytes(b"broken")
  split = open_dataset(DataSpec("folder", path=str(tmp_path))).test
  order = np.array([[5, 1, 3], [2, 4, 0]], np.int32)
  options = {"recipe": EvaluationRecipe(size=4, resize=4), "seed": 0, "purpose": 0, "epoch": 0, "workers": workers}
  batches = list(stream_batches(split, order, skip_broken=2, **options))
  assert [batch["images"][:, 0, 0, 0].tolist() for batch in batches] == [[0, 120, 120], [120, 160, 0]]
  assert [batch["weights"].tolist() for batch in batches] == [[0, 0, 1], [0, 1, 1]]
  assert [sorted(batch["broken"]) for batch in batches] == [[1, 2, 5], [2]]
  assert "val/only/5.png' is broken" in batches[0]["broken"][5]
  with refused("2 images are broken, more than the 1"):
    list(stream_batches(split, order, skip_broken=1, **options))


_PROGRAM = """
import signal, sys, time
import numpy as np
from multiprocessing import active_children
from sapr_jax.data import DataSpec, TrainingRecipe, open_dataset, stream_batches

if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program in a shell's background ignores
  split = open_dataset(DataSpec("folder", path=sys.argv[1])).train
  order = np.zeros((500, 80), np.int32)
  batches = stream_batches(split, order, recipe=TrainingRecipe(size=12), seed=0, purpose=1, epoch=0, workers=2)
  print(next(batches)["images"].shape, *(child.pid for child in active_children()), flush=True)
  time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def program(root, tmp_path):
  """Starts a program that leaves a stream open; gives it and the numbers of its workers."""

  def start(seconds):
    script = tmp_path / "left_open.py"
    script.write_text(_PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(sapr_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
      [sys.executable, str(script), str(root), str(seconds)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    *shape, first, second = process.stdout.readline().split()
    assert shape == ["(80,", "12,", "12,", "3)"]
    return process, (int(first), int(second))

  return start


def assert_ended(workers):
  """Waits until no process of these numbers is left."""
  deadline = time.monotonic() + 300
  for worker in workers:
    with contextlib.suppress(ProcessLookupError):
      while time.monotonic() < deadline:
        os.kill(worker, 0)
        time.sleep(0.05)
      pytest.fail("a worker outlived its parent")


@pytest.mark.slow
def test_a_program_that_leaves_a_stream_open_ends_quietly(program):
  process, workers = program(0)
  assert process.communicate(timeout=300) == ("", "")
  assert process.returncode == 0
  assert_ended(workers)


@pytest.mark.slow
def test_ctrl_c_is_left_to_the_parent_which_ends_its_workers(program):
  process, workers = program(100)
  os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to the workers too.
  _, err = process.communicate(timeout=300)
  assert (err.count("Traceback"), err.strip().splitlines()[-1]) == (1, "KeyboardInterrupt")
  assert_ended(workers)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(program):
  process, workers = program(100)
  process.kill()
  process.communicate(timeout=300)
  assert_ended(workers)


@pytest.mark.parametrize("package", ["cv2", "grain"])
def test_a_missing_package_is_refused_with_the_command(dataset, refused, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with refused("grain and OpenCV", "pip install 'sapr_jax[imagenet]'"):
    read(dataset.train, np.zeros((1, 1), np.int32))
