"""Epoch orders and batches: deterministic, complete, and of one shape."""

import numpy as np
import pytest

from sapr_jax.data import epoch_batches, epoch_order, evaluation_batches


def test_epoch_order_is_the_recorded_one():
  # Recorded once: a change here changes every run that anyone wants to repeat.
  assert epoch_order(8, seed=0, epoch=0, purpose="weights").tolist() == [5, 6, 2, 4, 1, 3, 7, 0]


def test_epoch_order_is_a_permutation_as_int32():
  order = epoch_order(1000, seed=3, epoch=7, purpose="weights")
  assert order.dtype == np.int32
  assert np.array_equal(np.sort(order), np.arange(1000))


def test_epoch_order_repeats_and_each_argument_changes_it():
  first = epoch_order(50, seed=1, epoch=2, purpose="weights")
  assert np.array_equal(first, epoch_order(50, seed=1, epoch=2, purpose="weights"))
  others = [
    epoch_order(50, seed=2, epoch=2, purpose="weights"),
    epoch_order(50, seed=1, epoch=3, purpose="weights"),
    epoch_order(50, seed=1, epoch=2, purpose="generator"),
    epoch_order(50, seed=1, epoch=2, purpose=0),
    epoch_order(50, seed=1, epoch=2, purpose=1),
  ]
  assert len({tuple(order) for order in [first, *others]}) == 6


def test_epoch_order_puts_every_image_at_every_place():
  orders = [epoch_order(3, seed=0, epoch=epoch, purpose="weights") for epoch in range(600)]
  counts = np.stack([np.bincount(column, minlength=3) for column in np.transpose(orders)])
  assert counts.min() > 150 and counts.max() < 250


def test_epoch_batches_are_the_full_batches_of_the_order():
  order = epoch_order(7, seed=5, epoch=1, purpose="weights")
  batches = epoch_batches(7, 3, seed=5, epoch=1, purpose="weights")
  assert batches.dtype == np.int32
  assert batches.tolist() == [order[:3].tolist(), order[3:6].tolist()]


def test_epoch_batches_leave_out_different_images_in_turn():
  left_out = set()
  for epoch in range(40):
    batches = epoch_batches(5, 2, seed=0, epoch=epoch, purpose="weights")
    left_out |= set(range(5)) - set(batches.ravel().tolist())
  assert left_out == set(range(5))


def test_evaluation_batches_by_hand():
  indices, weights = evaluation_batches(5, 2)
  assert indices.tolist() == [[0, 1], [2, 3], [4, 0]]
  assert weights.tolist() == [[1, 1], [1, 1], [1, 0]]
  assert (indices.dtype, weights.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8, 50])
@pytest.mark.parametrize("num_images", [1, 2, 7, 8, 9, 31])
def test_evaluation_batches_count_each_image_once(num_images, batch_size):
  indices, weights = evaluation_batches(num_images, batch_size)
  assert indices.shape == weights.shape == (-(-num_images // batch_size), batch_size)
  counted = np.bincount(indices.ravel(), weights.ravel(), minlength=num_images)
  assert counted.tolist() == [1] * num_images


def test_a_batch_larger_than_the_data_is_refused(refused):
  with refused("batch_size must be", "training images, 8, got 9"):
    epoch_batches(8, 9, seed=0, epoch=0, purpose="weights")
