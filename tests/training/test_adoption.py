"""A run takes over how images become inputs of the network that it starts from, or says why it will not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_run import small_config

import sapr_jax as sapr
from sapr_jax.configs import default_imagenet
from sapr_jax.training import adoption, build, check_config

NAMES = tuple(map(str, range(10)))
INPUTS = sapr.Inputs((8, 8, 1), mean=[0.25], std=[0.5], class_names=NAMES)


@pytest.fixture
def model_of(whole, tmp_path):
  """Saves the dense network of a run with other inputs, and returns its path."""

  def save(inputs):
    sapr.save(tmp_path / "model", *sapr.load(whole[0] / "dense"), inputs=inputs)
    return str(tmp_path / "model")

  return save


def test_a_run_saves_what_its_networks_take(whole):
  dense, pruned = (sapr.load_info(whole[0] / name) for name in ("dense", "pruned"))
  assert dense.inputs == pruned.inputs
  assert (pruned.inputs.shape, pruned.inputs.class_names, pruned.inputs.resize) == ((8, 8, 1), NAMES, None)
  for name, info in (("dense", dense), ("pruned", pruned)):
    measured = whole[1][name]
    assert {key: info.metrics[key] for key in measured} == measured
    assert (info.macs, info.params) == (measured["macs"], measured["params"])
  assert pruned.metrics["dense"] == whole[1]["dense"] and pruned.metrics["subnetwork"] == whole[1]["subnetwork"]
  assert pruned.metrics["images"] == 100 and pruned.metrics["device"] == whole[1]["run"]["device"]
  assert pruned.config == json.loads((whole[0] / "config.json").read_text())
  assert dense.widths == {} and pruned.widths["conv0"] == (8, whole[1]["run"]["widths"]["conv0"])


def test_the_card_of_a_run_has_its_numbers(whole):
  card = (whole[0] / "pruned" / "README.md").read_text()
  for name in ("dense", "subnetwork", "pruned"):
    assert f"{whole[1][name]['accuracy']:.2%}" in card
  assert "# tiny, pruned" in card and "on 100 test images" in card
  assert f"| `conv0` | 8 | {whole[1]['run']['widths']['conv0']} |" in card


def test_unset_fields_are_those_of_the_network(model_of, capsys):
  path = model_of(INPUTS)
  run = build(small_config(init__weights=path))
  assert run.passes.feed.inputs == INPUTS
  assert (
    f"images are normalized as for the network in {path}: mean (0.25,), deviation (0.5,)" in capsys.readouterr().out
  )


@pytest.mark.parametrize(("mean", "std"), [((0.3,), (0.5,)), ((0.25,), (0.45,)), ((0.25,) * 3, (0.5,) * 3)])
def test_another_normalization_is_refused(model_of, tmp_path, mean, std):
  config = small_config(init__weights=model_of(INPUTS), data__mean=mean, data__std=std)
  with pytest.raises(sapr.InputError, match=r"data\.mean and data\.std must be those .* leave them unset") as info:
    build(config)
  assert "\n" not in str(info.value)
  # What the line offers works.
  sapr.save(tmp_path / "copy", *sapr.load(config.init.weights))
  config.init.weights = str(tmp_path / "copy")
  assert adoption.inputs_of_weights(config) is None


def test_the_same_normalization_with_fewer_digits_is_taken(model_of):
  config = small_config(init__weights=model_of(INPUTS), data__mean=(0.251,), data__std=(0.499,))
  assert build(config).passes.feed.preprocessing.mean == (0.251,)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shape": (8, 8, 3), "mean": (0.5,) * 3, "std": (0.5,) * 3}, r"each of the 1 channels of these images, got 3"),
    ({"class_names": NAMES[:9]}, r"must have the 9 classes of the network in .*, got 10"),
  ],
)
def test_other_channels_or_numbers_of_classes_are_refused(model_of, monkeypatch, changes, message):
  config = small_config(init__weights=model_of(None))
  fields = {"shape": (8, 8, 1), "mean": (0.25,), "std": (0.5,), "class_names": NAMES} | changes
  monkeypatch.setattr("sapr_jax.training.experiment.inputs_of_weights", lambda config: sapr.Inputs(**fields))
  with pytest.raises(sapr.InputError, match=message):
    build(config)


def test_another_size_and_other_classes_are_said(capsys):
  other = sapr.Inputs((16, 16, 1), class_names=NAMES[::-1])
  adoption.compare_images(other, INPUTS, "m")
  adoption.compare_images(sapr.Inputs((8, 8, 1), class_names=list("abcdefghij")), INPUTS, "m")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "warning: the network in m was trained on images of shape (16, 16, 1); these have (8, 8, 1)"
  assert lines[1].startswith("warning: the network in m has the classes of these images in another order")
  assert lines[2].startswith("warning: the network in m was trained on other classes, ('a',")
  adoption.compare_images(INPUTS, INPUTS, "m")
  assert capsys.readouterr().out == ""
  with pytest.raises(sapr.InputError, match=r"must have the 3 channels that the network in m takes"):
    adoption.compare_images(sapr.Inputs((8, 8, 3)), INPUTS, "m")


PHOTOS = sapr.Inputs((96, 96, 3), mean=(0.5, 0.4, 0.3), std=(0.2,) * 3, resize=110)


def streamed(**fields):
  config = default_imagenet.get_config()
  unset = {"data.mean": None, "data.std": None, "data.image_size": None, "data.eval_resize": None}
  config.update_from_flattened_dict(unset | fields)
  return config


def test_streamed_images_have_the_size_of_the_network():
  config = streamed(**{"init.weights": "somewhere"})
  check_config(config)  # the network may say what is not set here
  fields = adoption.with_inputs(config, PHOTOS).data
  assert (fields.image_size, fields.eval_resize) == (96, 110)
  np.testing.assert_allclose(fields.mean, PHOTOS.mean)
  assert config.data.mean is None  # it is a copy
  fields = adoption.with_inputs(streamed(**{"data.image_size": 64}), PHOTOS).data
  assert (fields.image_size, fields.eval_resize) == (64, None)
  with pytest.raises(sapr.InputError, match=r"data\.mean must have red, green and blue"):
    check_config(streamed())
