"""Images resident on the devices or streamed from disk: what the steps get, and a whole run on streamed ones."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
import tiny_main  # noqa: F401  (its network compiles fast)
from PIL import Image

import sapr_jax as sapr
from sapr_jax import artifacts, data, training
from sapr_jax.configs import default_imagenet, digits
from sapr_jax.runtime import devices
from sapr_jax.training import feed, skipping
from sapr_jax.training.proposers import GeneratorProposer

STREAMED = {
  "model.name": "tiny",
  "data.source": "folder",
  "data.image_size": 16,
  "data.eval_resize": 18,
  "data.workers": 0,
  "train.epochs": 3,
  "train.batch_size": 8,
  "train.decay_epochs": (2,),
  "prune.start_epoch": 1,
  "prune.p": 0.5,
  "prune.select": "unjoined",
  "generator.data_share": 0.5,
  "generator.batch_size": 8,
  "finetune.epochs": 1,
  "finetune.batch_size": 8,
  "finetune.decay_epochs": (),
  "eval_batch_size": 8,
  "checkpoint.every_steps": 2,
  "report.latency_batch_sizes": (1,),
  "report.latency_repeats": 1,
  "report.page": False,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Two classes of images of many sizes: 24 for training, 11 for validation."""
  root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
  for split, count in (("train", 24), ("val", 11)):
    for number in range(count):
      name = "dark" if number % 2 else "light"
      (root / split / name).mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 128, (*rng.integers(20, 50, 2), 3), np.uint8) + (0 if name == "dark" else 100)
      Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.JPEG")
  return root


def streamed_config(photos, **overrides):
  pytest.importorskip("grain", reason="streaming needs grain and OpenCV: pip install 'sapr_jax[imagenet]'")
  config = default_imagenet.get_config()
  config.update_from_flattened_dict(STREAMED | {"data.path": str(photos)} | overrides)
  return config


def resident_feed(**overrides):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  config = digits.get_config()
  config.update_from_flattened_dict(
    {"data.train_images": 100, "data.test_images": 20, "eval_batch_size": 8} | overrides
  )
  return feed.open_feed(config, devices.data_mesh())


def test_resident_calls_are_of_one_length_where_that_is_near():
  order = data.epoch_batches(100, 8, seed=0, epoch=1, purpose=2)
  calls = list(resident_feed(steps_per_call=5).training(8, purpose=2, epoch=1))
  assert [len(call) for call in calls] == [4, 4, 4]
  np.testing.assert_array_equal(np.concatenate(calls), order)
  calls = list(resident_feed(steps_per_call=4).training(8, purpose=2, epoch=1, first=8))
  assert [len(call) for call in calls] == [4]
  np.testing.assert_array_equal(calls[0], order[8:])
  chosen = np.arange(10, 40, dtype=np.int32)
  (call,) = resident_feed(steps_per_call=5).training(10, purpose=2, epoch=0, images=chosen)
  assert sorted(call.ravel()) == chosen.tolist()


def test_resident_evaluation_counts_every_image_once():
  images = resident_feed(steps_per_call=2)
  calls = list(images.evaluation())
  assert [indices.shape for indices, _ in calls] == [(2, 8), (1, 8)]
  counted = [index for indices, weights in calls for index in indices[weights > 0]]
  assert sorted(counted) == list(range(images.num_test)) == list(range(20))


def test_the_statistics_are_those_of_the_training_images_unless_given():
  measured = resident_feed().preprocessing
  given = resident_feed(**{"data.mean": (0.5,), "data.std": (0.25,)}).preprocessing
  assert measured.mean == pytest.approx((0.305,), abs=0.01)
  assert (given.mean, given.std) == ((0.5,), (0.25,))


def test_streamed_batches_bring_their_images(photos):
  images = feed.open_feed(streamed_config(photos), devices.data_mesh())
  assert (images.num_train, images.num_test, images.num_classes, images.image_shape) == (24, 11, 2, (16, 16, 3))
  calls = list(images.training(8, purpose=1, epoch=0))
  assert [call["images"].shape for call in calls] == [(1, 8, 16, 16, 3)] * 3
  labels = np.concatenate([call["labels"].ravel() for call in calls])
  assert sorted(labels.tolist()) == [0] * 12 + [1] * 12
  brightness = np.concatenate([call["images"].mean((2, 3, 4)).ravel() for call in calls])
  assert (brightness[labels == 0] < 100).all() and (brightness[labels == 1] > 120).all()
  (rest,) = images.training(8, purpose=1, epoch=0, first=2)
  np.testing.assert_array_equal(rest["images"], calls[2]["images"])

  counts = [weights.sum() for _, weights in images.evaluation()]
  assert counts == [8, 3]


@pytest.fixture(scope="module")
def streamed_run(photos, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("streamed") / "run"
  return workdir, training.run(streamed_config(photos), workdir).summary


@pytest.mark.slow
def test_a_run_on_streamed_images(streamed_run, photos):
  workdir, summary = streamed_run
  records = artifacts.read_records(workdir)
  assert [(record["stage"], record["epoch"]) for record in records] == [
    ("train", 1), ("train", 2), ("train", 3), ("finetune", 1),
  ]  # fmt: skip
  assert records[-1]["test_accuracy"] == summary["pruned"]["accuracy"]
  # Eleven images, whatever the batch size.
  assert summary["pruned"]["accuracy"] * 11 == pytest.approx(round(summary["pruned"]["accuracy"] * 11))
  assert 0.45 < summary["pruned"]["macs"] / summary["dense"]["macs"] < 0.55
  model, variables = sapr.load(workdir / "pruned")
  assert model.apply(variables, np.zeros((1, 16, 16, 3))).shape == (1, 2)
  inputs = sapr.load_info(workdir / "pruned").inputs
  assert (inputs.shape, inputs.resize, inputs.class_names) == ((16, 16, 3), 18, ("dark", "light"))
  measured = sapr.evaluate(workdir / "pruned", data=photos, batch_size=8)
  assert (measured["accuracy"], measured["images"]) == (summary["pruned"]["accuracy"], 11)
  assert measured["loss"] == pytest.approx(summary["pruned"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_streamed_run_killed_within_an_epoch_goes_on_at_the_step(photos, streamed_run, tmp_path, monkeypatch):
  class KilledError(Exception):
    pass

  save = artifacts.Checkpointer.save

  def saving(checkpointer, step, state, position):
    save(checkpointer, step, state, position)
    if position["epoch"] == 2 and position["step"] == 2:  # of three steps of the last epoch
      raise KilledError

  monkeypatch.setattr(artifacts.Checkpointer, "save", saving)
  with pytest.raises(KilledError):
    training.run(streamed_config(photos), tmp_path / "run")
  monkeypatch.setattr(artifacts.Checkpointer, "save", save)
  proposed, propose = [], GeneratorProposer.propose

  def proposing(proposer, state, variables, epoch):
    proposed.append(epoch)
    return propose(proposer, state, variables, epoch)

  monkeypatch.setattr(GeneratorProposer, "propose", proposing)
  # With a worker process in place of threads: it changes nothing.
  training.run(streamed_config(photos, **{"data.workers": 1}), tmp_path / "run")
  assert proposed == []  # the masks of the epoch were found before
  for name in ("dense", "pruned"):
    got, want = (sapr.load(workdir / name)[1] for workdir in (tmp_path / "run", streamed_run[0]))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_a_broken_image_is_named_and_the_run_can_go_on(photos, tmp_path):
  shutil.copytree(photos, tmp_path / "photos")
  file = tmp_path / "photos" / "train" / "dark" / "1.JPEG"
  whole = file.read_bytes()
  file.write_bytes(whole[:200])
  config = streamed_config(tmp_path / "photos", **{"train.epochs": 2, "train.decay_epochs": ()})
  with pytest.raises(sapr.InputError, match=r"image .*dark/1\.JPEG' is broken"):
    training.run(config, tmp_path / "run")
  file.write_bytes(whole)
  with pytest.raises(sapr.InputError, match=r"other images: .*data\.changed_ok=True"):
    training.run(config, tmp_path / "run")
  config.data.changed_ok = True
  assert 0 <= training.run(config, tmp_path / "run").summary["pruned"]["accuracy"] <= 1


def test_broken_images_are_skipped_named_once_and_counted_over_all_starts(photos, tmp_path, capsys):
  copy = shutil.copytree(photos, tmp_path / "copy")
  for file in ("train/dark/1.JPEG", "train/light/2.JPEG", "val/dark/3.JPEG"):
    (copy / file).write_bytes(b"broken")

  def opened(limit):
    found = feed.open_feed(streamed_config(copy, **{"data.skip_broken": limit}), devices.data_mesh())
    found.skipped.keep_in(tmp_path / "skipped")
    return found

  def epoch(feed):
    return [(calls["images"], calls["labels"]) for calls in feed.training(8, purpose=1, epoch=0)]

  first = opened(3)
  images, _ = first.training(8, purpose=1, epoch=0), epoch(first)
  assert sum(float(weights.sum()) for _, weights in first.evaluation()) == 11 - 1
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 3 and all("data.skip_broken=3 allows" in line for line in warnings)
  again = opened(3)
  assert "3 broken images are skipped, which" in capsys.readouterr().err
  for batch, other in zip(images, epoch(again), strict=True):
    np.testing.assert_array_equal(batch["images"], other[0])
    np.testing.assert_array_equal(batch["labels"], other[1])
  assert capsys.readouterr().err == ""
  with pytest.raises(sapr.InputError, match=r"3 images are broken, more than the 2 that skip_broken allows; .*3\.JPEG"):
    opened(2)


def test_more_broken_images_than_are_allowed_stop_the_pass(photos, tmp_path):
  copy = shutil.copytree(photos, tmp_path / "copy")
  for number in (1, 3):
    (copy / "train" / "dark" / f"{number}.JPEG").write_bytes(b"broken")
  limited = feed.open_feed(streamed_config(copy, **{"data.skip_broken": 1}), devices.data_mesh())
  with pytest.raises(sapr.InputError, match=r"2 images are broken, more than the 1 .*dark/[13]\.JPEG' is broken"):
    list(limited.training(8, purpose=1, epoch=0))


def test_images_in_memory_tell_what_was_skipped(photos, tmp_path, capsys):
  for file in photos.rglob("*.JPEG"):
    (tmp_path / file.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
    Image.open(file).resize((16, 16)).save(tmp_path / file.relative_to(photos))
  (tmp_path / "val").rename(tmp_path / "test")
  (tmp_path / "train" / "dark" / "5.JPEG").write_bytes(b"")
  config = digits.get_config()
  config.data.source, config.data.path, config.data.skip_broken = "folder", str(tmp_path), 1
  assert feed.open_feed(config, devices.data_mesh()).num_train == 23
  assert "skipped, as data.skip_broken=1 allows: image" in capsys.readouterr().err


def test_crops_must_hold_something_of_the_image():
  assert resident_feed(**{"data.crop_padding": 7}).preprocessing.crop_padding == 7
  with pytest.raises(sapr.InputError, match="crop_padding must be below the 8 pixels"):
    resident_feed(**{"data.crop_padding": 8})


def test_damaged_lines_of_the_skipped_images_cost_themselves_alone(tmp_path, capsys):
  file = tmp_path / "skipped_images.jsonl"
  damaged = [b'["train", 1, "no pixels"]', b"[" * 10**5, b'["train", 1e999, "x"]', b"{}", b'["tra']
  file.write_bytes(b"\n".join(damaged))
  images = skipping.SkippedImages(2)
  images.keep_in(file)
  images.add("test", {2: "no header"})
  assert file.read_text() == '["train", 1, "no pixels"]\n["test", 2, "no header"]\n'
  again = skipping.SkippedImages(1)
  with pytest.raises(sapr.InputError, match="2 images are broken, more than the 1 that skip_broken allows"):
    again.keep_in(file)
