"""Bad inputs: each ends with one line that says what is wrong, and leaves the work directory as it was.

One table of what goes through the library, and one of what goes through the command line. Nearly all rows fail before
anything is compiled.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

import sapr_jax as sapr
from sapr_jax import data, training
from sapr_jax.configs import default_imagenet, digits
from sapr_jax.training import workdir as layout

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")

ROOT = pathlib.Path(__file__).parent.parent
WIDTHS = {"model.width_multiplier": 0.25}  # those of the fixture `tiny`


@dataclasses.dataclass(frozen=True)
class Files:
  """Where a row finds and makes its files.

  Attributes:
    tiny: The network of the fixture.
    given: Holds `model/`, its saved model, and `weights.safetensors`, the same for PyTorch. Not to be changed.
    here: A folder of the row's own.
    workdir: The work directory, not made yet.
  """

  tiny: Any
  given: pathlib.Path
  here: pathlib.Path
  workdir: pathlib.Path

  def write(self, name: str, content: bytes) -> str:
    (self.here / name).write_bytes(content)
    return str(self.here / name)


Act = Callable[[Files], Any]


@dataclasses.dataclass(frozen=True)
class Row:
  """A bad input.

  Attributes:
    name: What is wrong.
    act: What is done with it.
    message: Regular expression.
    prepare: What is done before.
  """

  name: str
  act: Act
  message: str
  prepare: Act = lambda files: None


# ----------------------------------------------------------------------------------------------------------------------
# What is done
# ----------------------------------------------------------------------------------------------------------------------


def small_config(**fields: Any) -> ConfigDict:
  config = digits.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  return config


def run(fields: dict[str, Any] | None = None) -> Act:
  """Runs the digits with these fields."""
  return lambda files: training.run(small_config(**(fields or {})), files.workdir)


def run_on(make: Callable[[Files], str], **fields: Any) -> Act:
  """Runs with the first weights that `make` returns the path of."""
  return lambda files: run({**WIDTHS, "init.weights": make(files), **fields})(files)


def run_tiny(**fields: Any) -> Act:
  """Runs from given weights, so that nothing is compiled before the channels are known."""
  return run_on(lambda files: str(files.given / "model"), **{k.replace("__", "."): v for k, v in fields.items()})


def run_folder(change: Callable[[pathlib.Path], Any], *, stream: bool = False, **fields: Any) -> Act:
  """Runs on a folder of images of 8x8 pixels that `change` has been at."""

  def act(files: Files) -> Any:
    for split in ("train", "test"):
      for name in ("cat", "dog"):
        (files.here / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(files.here / split / name / "0.png")
    change(files.here)
    config = default_imagenet.get_config() if stream else digits.get_config()
    config.update_from_flattened_dict({"model.name": "resnet8", "data.source": "folder", **fields})
    config.data.path = str(files.here)
    return training.run(config, files.workdir)

  return act


def saved(**changes: Any) -> Callable[[Files], str]:
  """Returns the path of the saved model with entries of its definition changed."""

  def make(files: Files) -> str:
    shutil.copytree(files.given / "model", files.here / "model")
    file = files.here / "model" / "model.json"
    definition = json.loads(file.read_text())
    for place, value in changes.items():
      *parents, last = place.split("__")
      entry = definition
      for name in parents:
        entry = entry[name]
      entry[last] = value
    del definition["sha256"]["model.json"]  # as in the files of older versions
    file.write_text(json.dumps(definition))
    return str(files.here / "model")

  return make


def saved_without(*path: str) -> Callable[[Files], str]:
  """Returns the path of a saved model that lacks a variable or a collection."""

  def make(files: Files) -> str:
    variables = jax.tree.map(lambda leaf: leaf, files.tiny.variables)
    parent = variables
    for name in path[:-1]:
      parent = parent[name]
    del parent[path[-1]]
    sapr.save(files.here / "model", files.tiny.model, variables)
    return str(files.here / "model")

  return make


def damaged(name: str, damage: Callable[[pathlib.Path], Any]) -> Callable[[Files], str]:
  """Returns the path of the saved model after `damage` to one of its files."""

  def make(files: Files) -> str:
    path = saved()(files)
    damage(pathlib.Path(path) / name)
    return path

  return make


def torch_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Files], str]:
  """Returns the path of weights for PyTorch with their bytes changed."""
  return lambda files: files.write(name, change((files.given / "weights.safetensors").read_bytes()))


# The second where PyTorch is not installed.
NO_TORCH_FILE = r"a\.pth cannot be read as a file of torch\.save|a\.pth needs PyTorch, which is not installed"


def change_state(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[bytes], bytes]:
  def changed(content: bytes) -> bytes:
    state = safetensors.numpy.load(content)
    change(state)
    return safetensors.numpy.save(state)

  return changed


class Hostile:
  """Unpickling it would make a file."""

  def __reduce__(self) -> Any:
    return pathlib.Path.touch, (pathlib.Path("executed"),)


def hostile_zip(name: str) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(name, pickle.dumps({"fc.weight": Hostile()}))
  return file.getvalue()


def png(size: tuple[int, int] = (8, 8), header: tuple[int, int] | None = None) -> bytes:
  """Returns a PNG; its header may claim another size, with the right checksum."""
  file = io.BytesIO()
  Image.new("RGB", size).save(file, "png")
  content = file.getvalue()
  if header is None:
    return content
  import zlib

  head = b"IHDR" + struct.pack(">II", *header) + content[24:29]
  return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def put_image(content: bytes | Image.Image, name: str = "1.png") -> Callable[[pathlib.Path], Any]:
  def put(root: pathlib.Path) -> None:
    file = root / "train" / "dog" / name
    file.write_bytes(content) if isinstance(content, bytes) else content.save(file)

  return put


def prune(**masks: Any) -> Act:
  """Prunes with the mask of a group replaced ("first"), left out (None), or another one added."""

  def act(files: Files) -> Any:
    graph, chosen = files.tiny.graph, files.tiny.graph.full_masks()
    first = graph.groups[0]
    for name, mask in masks.items():
      if mask is None:
        del chosen[first.name]
      else:
        chosen[first.name if name == "first" else name] = mask(first.size) if callable(mask) else mask
    return sapr.prune(files.tiny.model, files.tiny.variables, graph, chosen)

  return act


def project(p: Any = 0.5, scores: Callable[[dict[str, Any], str], Any] = lambda s, name: None, **limits: Any) -> Act:
  def act(files: Files) -> Any:
    graph = files.tiny.graph
    ranked = {group.name: np.arange(group.size, dtype=float) for group in graph.groups}
    scores(ranked, graph.groups[0].name)
    return sapr.project_to_budget(graph, ranked, sapr.macs_budget(graph, p), **limits)

  return act


class Flat(nn.Module):
  """No channel of it can be cut."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


def trace_flat(files: Files) -> Any:
  model = Flat()
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
  return sapr.trace_channels(model, variables, (1, 4, 4, 1))


def trace(**changed: Any) -> Act:
  def act(files: Files) -> Any:
    arguments = {"model": files.tiny.model, "variables": files.tiny.variables, "input_shape": (1, 8, 8, 1), **changed}
    return sapr.trace_channels(**arguments)

  return act


def made(files: Files, **fields: Any) -> None:
  layout.make_workdir(files.workdir, small_config(**fields))


def spoil(name: str, content: bytes | None) -> Act:
  """Makes a work directory in which a file is damaged, or is a directory."""

  def prepare(files: Files) -> None:
    made(files)
    (files.workdir / name).unlink(missing_ok=True)
    (files.workdir / name).mkdir() if content is None else (files.workdir / name).write_bytes(content)

  return prepare


def foreign(files: Files) -> None:
  files.workdir.mkdir()
  (files.workdir / "1.jpg").write_text("a photo")


# ----------------------------------------------------------------------------------------------------------------------
# The library
# ----------------------------------------------------------------------------------------------------------------------


def field(name: str, value: Any, message: str) -> Row:
  return Row(f"{name}={value!r}", run({name: value}), message)


ROWS = [
  # The configuration; tests/training/test_config.py has the values that each field refuses
  field("seed", 2**32, r"^seed must be an integer of at least 0 and at most 4294967295, got 4294967296\.$"),
  field("model.name", "rés\nnet", r"^model\.name must be one of .*resnet56.*, got 'rés\\nnet'\.$"),
  field("data.path", "a\0b", r"^data\.path must be a path, or unset, got 'a\\x00b'\.$"),
  field("data.train_images", 5000, r"cannot choose 5000 of 1197 images"),
  field("data.train_images", 63, r"train\.batch_size=64 is more than the 63 images there are"),
  field("data.mean", (0.5,), r"data\.mean and data\.std must be of one length, got \(0\.5,\) and None"),
  Row(
    "data.mean of colours for gray images",
    run({"data.mean": (0.5, 0.5, 0.5), "data.std": (0.2, 0.2, 0.2)}),
    r"data\.mean must have one number for each of the 1 channels of these images, got 3: \(0\.5, 0\.5, 0\.5\)",
  ),
  Row("data.std of zero", run({"data.mean": (0.5,), "data.std": (0,)}), r"data\.std must have no zero, got \(0,\)"),
  Row("streamed, no mean", run({"data.stream": True}), r"data\.mean must have red, green and blue .*, got None"),
  field("train.batch_size", 2000, r"train\.batch_size=2000 is more than the 1197 images there are"),
  field("finetune.batch_size", 2000, r"finetune\.batch_size=2000 is more than the 1197 images there are"),
  field(
    "train.decay_epochs", (20, 40), r"decay_epochs must be rising epochs between 0 and train\.epochs = 30, got \(2"
  ),
  field("train.decay_epochs", (20, 10), r"decay_epochs must be rising epochs .*, got \(20, 10\)"),
  field("train.warmup_epochs", 31, r"train\.warmup_epochs must be at most train\.epochs = 30, got 31"),
  field("prune.start_epoch", 30, r"prune\.start_epoch must be at most train\.epochs - 1 = 29, got 30, .* no epoch"),
  field("generator.data_share", 0.01, r"generator\.batch_size=64 is more than the 12 images there are"),
  field("train", None, r"train\.epochs is missing in the configuration; start from that of configs/default\.py"),
  Row("no ConfigDict", lambda f: training.run({"seed": 0}, f.workdir), r"config must be the ConfigDict .*, got a dict"),
  Row(
    "a config of one field", lambda f: training.run(ConfigDict({"seed": 0}), f.workdir), r"steps_per_call is missing in"
  ),
  # Budgets
  Row("p too small", run_tiny(prune__p=0.2), r"budget must be at least 14,400 .* \(0\.3125 of all\), .*min_width=2"),
  Row("min_width too large", run_tiny(prune__min_width=16), r"smallest widths \(min_width=16, .*got .*\(0\.4900\)"),
  Row("round_to leaves all", run_tiny(prune__round_to=64), r"smallest widths \(.*round_to=64\), got .*\(0\.4900\)"),
  Row("p of text", project("0.5"), r"p must be a number in \(0, 1\], got '0\.5'"),
  Row("scores with NaN", project(scores=lambda s, n: s.update({n: np.full(4, np.nan)})), r"scores of .* got a NaN"),
  Row(
    "scores of another shape",
    project(scores=lambda s, n: s.update({n: np.ones(3)})),
    r"must have shape \(4,\), got \(3,\)",
  ),
  Row("scores lack a group", project(scores=lambda s, n: s.pop(n)), r"got none for 'stage1_block1/conv1'"),
  Row("scores of no group", project(scores=lambda s, n: s.update(x=np.ones(3))), r"got an unknown group 'x'"),
  # Masks
  Row(
    "a mask of another shape", prune(first=np.ones(3)), r"mask of group 'stage1_.*' must have shape \(4,\), got \(3,\)"
  ),
  Row("a mask is missing", prune(first=None), r"masks misses the group 'stage1_block1/conv1'"),
  Row("a mask of no group", prune(x=np.ones(3)), r"masks names an unknown group 'x'"),
  Row("a mask of zeros", prune(first=np.zeros), r"drops all 4 channels; keep at least one"),
  Row("a mask with NaN", prune(first=lambda n: np.full(n, np.nan)), r"must hold only 0 \(drop\) and 1 \(keep\)"),
  Row("a fractional mask", prune(first=lambda n: np.full(n, 0.5)), r"must hold only 0 \(drop\) and 1 \(keep\)"),
  Row(
    "a traced mask",
    lambda f: jax.eval_shape(lambda mask: prune(first=mask)(f), jnp.ones(4)),
    r"mask of group 'stage1_block1/conv1' must be concrete .* cut outside of jax\.jit",
  ),
  # Networks
  Row("no channel group", trace_flat, r"select='blocks' finds no channel group to prune"),
  Row("no channel to cut", run({"model.width_multiplier": 1e-9}), r"finds no channel group to prune; .*single channel"),
  Row("input of another depth", trace(input_shape=(1, 8, 8, 3)), r"do not fit together: .*\"kernel\" in \"/conv\""),
  Row("input of size 0", trace(input_shape=(1, 0, 8, 1)), r"input_shape must be positive sizes, .* got \(1, 0, 8, 1\)"),
  Row("select is unknown", trace(select="all"), r"select must be one of .*, got 'all'"),
  # First weights: saved models
  Row("weights: nothing there", run_on(lambda f: str(f.here / "nothing.pth")), r"nothing\.pth is missing"),
  Row("weights: no ending", run_on(lambda f: f.write("weights", b"")), r"weights has an unknown ending; expected"),
  Row("weights: empty path", run({"init.weights": ""}), r"init\.weights must be a path, or unset, got ''"),
  Row("model: another directory", run_on(lambda f: str(f.here)), r"model\.json is missing; .* is not the directory"),
  Row("model: of another network", run_on(saved(), **{"model.name": "resnet14"}), r"with depth=8; base has depth=14"),
  Row("model: broken JSON", run_on(damaged("model.json", lambda f: f.write_text("{"))), r"model\.json is damaged"),
  Row(
    "model: deep JSON", run_on(damaged("model.json", lambda f: f.write_text("[" * 10**5))), r"model\.json is damaged"
  ),
  Row(
    "model: weights cut", run_on(damaged("weights.safetensors", lambda f: f.write_bytes(b"x"))), r"is damaged: its SHA"
  ),
  Row("model: weights missing", run_on(damaged("weights.safetensors", pathlib.Path.unlink)), r"safetensors is missing"),
  Row("model: code as class", run_on(saved(base__class="os.system")), r"holds a os\.system; base is a CifarResNet"),
  Row("model: shape of a number", run_on(saved(**{"variables__params/fc/bias__shape": 5})), r"model\.json is damaged"),
  Row(
    "model: name with dots", run_on(saved(**{"variables__../../x": {"shape": [], "dtype": ""}})), r"model\.json is dam"
  ),
  Row("model: negative width", run_on(saved(widths={"conv": {"features": -3}})), r"model\.json is damaged"),
  Row("model: other field", run_on(saved(widths={"conv": {"strides": 3}})), r"model\.json is damaged"),
  Row("model: wrong width", run_on(saved(widths={"conv": {"features": 3}})), r"do not fit together: .*\(3, 3, 1, 3\)"),
  Row("model: lacks a variable", run_on(saved_without("params", "fc", "bias")), r"do not fit together: .*\"bias\" in"),
  Row(
    "model: no statistics", run_on(saved_without("batch_stats")), r"do not fit together: .*\"batch_stats\" in \"/bn\""
  ),
  Row(
    "a slash in a name",
    lambda f: sapr.save(f.here / "model", f.tiny.model, {"params": {"../../x": np.ones(3)}}),
    r"has a slash in a name",
  ),
  # First weights: PyTorch
  Row("torch: truncated", run_on(torch_file("a.safetensors", lambda c: c[:-5])), r"is not a whole safetensors file"),
  Row("torch: empty", run_on(torch_file("a.safetensors", lambda c: b"")), r"is not a whole safetensors file"),
  Row(
    "torch: a directory", run_on(lambda f: (f.here / "a.pth").mkdir() or str(f.here / "a.pth")), r"a\.pth .*directory"
  ),
  Row("torch: of another kind", run_on(torch_file("a.pth", lambda c: c)), NO_TORCH_FILE),
  Row(
    "torch: another network", run_on(torch_file("a.safetensors", bytes), **{"model.name": "resnet14"}), r"fit CifarRes"
  ),
  Row(
    "torch: other classes",
    run_on(torch_file("a.safetensors", change_state(lambda s: s.update({"fc.bias": s["fc.bias"][:5]})))),
    r"does not fit CifarResNet: of the wrong shape fc\.bias \[5\] instead of \[10\]",
  ),
  Row(
    "torch: a tensor too many",
    run_on(torch_file("a.safetensors", change_state(lambda s: s.update({"../../x": np.ones(3)})))),
    r"does not fit CifarResNet: left over \.\./\.\./x",
  ),
  Row("torch: hostile", run_on(lambda f: f.write("a.pth", pickle.dumps(Hostile()))), NO_TORCH_FILE),
  Row(
    "torch: hostile zip",
    run_on(lambda f: f.write("a.pth", hostile_zip("x/data.pkl"))),
    NO_TORCH_FILE,
  ),
  Row("torch: zip with dots", run_on(lambda f: f.write("a.pth", hostile_zip("../../data.pkl"))), NO_TORCH_FILE),
  # Images
  Row(
    "images: no folder", run({"data.source": "folder", "data.path": "/no/where"}), r"no folder '/no/where'; expected"
  ),
  Row("images: no path", run({"data.source": "folder"}), r"source=folder needs the path of a folder"),
  Row("images: a split is missing", run_folder(lambda d: shutil.rmtree(d / "test")), r"has no 'test' folder"),
  Row(
    "images: no class", run_folder(lambda d: [shutil.rmtree(c) for c in (d / "test").iterdir()]), r"has no class folder"
  ),
  Row(
    "images: other classes",
    run_folder(lambda d: (d / "test/dog").rename(d / "test/cow")),
    r"different classes; .*'cow'",
  ),
  Row("images: a class is empty", run_folder(lambda d: (d / "train/dog/0.png").unlink()), r"train/dog' holds no image"),
  Row("images: a loop", run_folder(lambda d: (d / "train/x").symlink_to(d / "train")), r"different classes; .*'x'"),
  Row("image: text", run_folder(put_image(b"no image")), r"image '.*train/dog/1\.png' is broken .* is none of JPEG"),
  Row("image: empty", run_folder(put_image(b"")), r"image '.*train/dog/1\.png' is broken"),
  Row("image: truncated", run_folder(put_image(png((64, 64))[:-40])), r"image '.*train/dog/1\.png' is broken"),
  Row(
    "image: a program", run_folder(put_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")), r"is none of JPEG"
  ),
  Row("image: of another size", run_folder(put_image(png((9, 8)))), r"1\.png' is 8x9 but the first image, .*is 8x8"),
  Row(
    "image: 16 bit", run_folder(put_image(Image.fromarray(np.zeros((8, 8), np.uint16)))), r"mode 'I;16'; expected 8 bit"
  ),
  Row("image: a bomb", run_folder(put_image(png(header=(60000, 60000)))), r"'.*/1\.png'.*exceeds limit"),
  Row("image: newline in its name", run_folder(put_image(b"", "a\nb.png")), r"image '.*/a\\nb\.png' is broken"),
  Row("image: a broken link", run_folder(lambda d: (d / "train/dog/1.png").symlink_to("/no")), r"No such file or dir"),
  Row("streamed: no folder", run_folder(lambda d: shutil.rmtree(d / "test"), stream=True), r"has no 'val' folder"),
  Row(
    "streamed: few images", run_folder(lambda d: None, stream=True), r"train\.batch_size=256 is more than the 2 images"
  ),
  Row(
    "streamed: resize",
    run_folder(lambda d: None, stream=True, **{"data.eval_resize": 8}),
    r"data\.eval_resize must be at least data\.image_size = 224, got 8",
  ),
  Row(
    "digits streamed", lambda f: data.open_dataset(data.DataSpec("digits")), r"data source 'digits' cannot be streamed"
  ),
  Row("a source of no name", lambda f: data.load_dataset(data.DataSpec("web")), r"unknown data source 'web'"),
  Row(
    "half an image",
    lambda f: data.load_dataset(data.DataSpec("digits", train_images=5.5)),
    r"cannot choose 5\.5 of 1197 images",
  ),
  # Work directories
  Row("workdir: a file", run(), r"/run' is a file; name another --workdir", lambda f: f.workdir.write_text("x")),
  Row(
    "workdir: below a file",
    lambda f: training.run(small_config(), f.workdir / "deeper"),
    r"/run/deeper' lies below a file",
    lambda f: f.workdir.write_text("x"),
  ),
  Row(
    "workdir: null byte",
    lambda f: training.run(small_config(), f"{f.workdir}\0"),
    r"cannot be used \(.*null (byte|character in path)\)",
  ),
  Row(
    "workdir: no UTF-8", lambda f: training.run(small_config(), f.here / "\udcff"), r"must have a name in UTF-8; name"
  ),
  Row("workdir: name too long", lambda f: training.run(small_config(), f.here / ("x" * 300)), r"File name too long"),
  Row("workdir: other files", run(), r"holds other files and no run", foreign),
  Row(
    "workdir: another run", run({"prune.p": 0.3}), r"another configuration: prune\.p was 0\.49 and is now 0\.3;", made
  ),
  Row("workdir: broken config", run(), r"config\.json is damaged; put a copy back", spoil("config.json", b"{")),
  Row("workdir: binary config", run(), r"config\.json is damaged", spoil("config.json", b"\xff\0\xfe")),
  Row(
    "workdir: config is a folder", run(), r"config\.json is a directory, but must be a file", spoil("config.json", None)
  ),
  Row("workdir: records are a folder", run(), r"records\.jsonl is a directory", spoil("records.jsonl", None)),
  Row("workdir: summary is a folder", run(), r"summary\.json is a directory", spoil("summary.json", None)),
  Row("workdir: a model that is none", run(), r"dense holds no whole model", spoil("dense", None)),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny):
  folder = tmp_path_factory.mktemp("given")
  sapr.save(folder / "model", tiny.model, tiny.variables)
  sapr.export_torch(folder / "weights.safetensors", tiny.model, tiny.variables)
  return folder


def contents(path: pathlib.Path) -> Any:
  """Returns all that is at `path`, None if nothing is."""
  if not path.is_dir():
    return path.read_bytes() if path.exists() else None
  return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_refused_in_one_line(row, given, tiny, tmp_path, monkeypatch):
  (tmp_path / "here").mkdir()
  (tmp_path / "current").mkdir()
  monkeypatch.chdir(tmp_path / "current")
  files = Files(tiny, given, tmp_path / "here", tmp_path / "run")
  row.prepare(files)
  before = contents(files.workdir)
  with pytest.raises(sapr.InputError) as info:
    row.act(files)
  message = str(info.value)
  assert re.search(row.message, message), message
  assert "\n" not in message
  assert contents(files.workdir) == before
  assert not list((tmp_path / "current").iterdir())  # no file was executed, nothing written beside
  assert {path.name for path in tmp_path.iterdir()} <= {"here", "current", "run"}


def test_there_are_at_least_sixty_bad_inputs():
  assert len({row.name for row in ROWS}) == len(ROWS) >= 60


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

DIGITS = "--config=configs/digits.py"
HEAD = "from sapr_jax.configs import digits\ndef get_config():\n  config = digits.get_config()\n"
CONFIG_FILES = {  # that give something else than a configuration
  "nothing": "def get_config():\n  pass",
  "dict": "def get_config():\n  return {'seed': 0}",
  "part": "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'seed': 0})",
}
CONFIG_ERRORS = {  # that raise an error, and what its traceback says
  "text": ("this is no Python", r"SyntaxError: invalid syntax"),
  "empty": ("", r"has no attribute 'get_config'"),
  "function": ("get_config = 3", r"not callable"),
  "division": (HEAD + "  1 / 0", r'division\.py", line 4, in get_config\n(.*\n)+ZeroDivisionError: division by zero'),
  "name": (HEAD + "  confg.seed = 1", r"name\.py\", line 4, in get_config\n(.*\n)+NameError: name 'confg'"),
  "field": (
    HEAD + "  config.train.lr = 0.1\n  return config",
    r'field\.py", line 4(.*\n)+AttributeError: .*Key "lr" does not',
  ),
  "type": (
    HEAD + "  config.train.learning_rate = 'high'\n  return config",
    r"TypeError: Could not override field 'learning_r",
  ),
  "import": ("import nothing_of_this_name", r"No module named 'nothing_of_this_name'"),
  "binary": ("\0", r"null bytes"),
}
COMMANDS = [
  ([], r"--config is missing"),
  ([DIGITS, "--workdir="], r"--workdir is missing"),
  ([DIGITS, "--workdir"], r"Missing value for flag --workdir"),
  (["--config=digits", "--config.prune.p=0"], r"prune\.p must be a number in \(0, 1\], got 0\.0\."),
  ([DIGITS, "surplus"], r"unexpected argument 'surplus'"),
  ([DIGITS, "--nonsense"], r"Unknown command line flag 'nonsense'"),
  ([DIGITS, "--config.model.nam=resnet8"], r'Did you mean "name"'),
  ([DIGITS, "--config.prune.p=1.5"], r"prune\.p must be a number in \(0, 1\], got 1\.5\."),
  ([DIGITS, "--config.train.epochs.x=1"], r"no such field.*train\.epochs\.x"),
  ([DIGITS, "--config.train=1"], r"--config\.train=1: .*not a dict"),
  ([DIGITS, "--config.train.epochs=many"], r"--config\.train\.epochs=many: invalid literal for int"),
  ([DIGITS, "--config.train.epochs=1.5"], r"--config\.train\.epochs=1\.5: invalid literal for int"),
  ([DIGITS, "--config.train.learning_rate=high"], r"learning_rate=high: could not convert string to float"),
  ([DIGITS, "--config.train.learning_rate=1e400"], r"train\.learning_rate must be a number above 0, got inf"),
  ([DIGITS, "--config.train.nesterov=maybe"], r"--config\.train\.nesterov=maybe"),
  ([DIGITS, "--config.train.decay_epochs=(3"], r"train\.decay_epochs must be a tuple of integers, .*, got \('\(3',\)"),
  ([DIGITS, "--config.train.decay_epochs=open('executed', 'w')"], r"must be a tuple of integers"),
  ([DIGITS, "--config.data.mean=(0.5"], r"data\.mean must be a tuple with a number in \[0, 1\] .*, got \('\(0\.5',\)"),
  ([DIGITS, "--config.data.mean=(0.1, 0.2, 0.3)"], r"must be of one length, got \(0\.1, 0\.2, 0\.3\) and None"),
  (
    [DIGITS, "--config.report.latency_batch_sizes=('x',)"],
    r"must be a tuple of integers of at least 1, .*, got \('x',\)",
  ),
  ([DIGITS, "--config.model.name=resnet9"], r"model\.name must be one of resnet8, .*, got 'resnet9'"),
  (
    [DIGITS, "--config.init.weights=/no/where\n.pth", *[f"--config.{k}={v}" for k, v in WIDTHS.items()]],
    r"where\\n\.pth",
  ),
  ([DIGITS, "--workdir=/dev/null/run"], r"/dev/null/run' lies below a file"),
  ([DIGITS, "--workdir=gs://bucket/run"], r"'gs:/bucket/run' must be on a mounted file system, and gs:// is not"),
  (
    [DIGITS, "--config.train.epochs=1"],
    r"decay_epochs must be .*, got \(20, 26\); such as --\S+decay_epochs='\(\)'\.$",
  ),
  ([DIGITS, "--connect_seconds=0"], r"--connect_seconds=0"),
  (["--config=/no/where.py"], r"/no/where\.py"),
  (["--config=digit"], r"--config=digit: must be a file or one of digits, .*, resnet56_cifar10"),
  (["--config=configs"], r"Is a directory: 'configs'"),
  (["--config=/dev/null"], r"/dev/null must be a file, and is a pipe or a device"),
  (["--config=FILES/nothing.py"], r"get_config\(\) must return the ConfigDict of .*, got a NoneType"),
  (["--config=FILES/dict.py"], r"get_config\(\) must return the ConfigDict of .*, got a dict"),
  (["--config=FILES/part.py"], r"steps_per_call is missing in the configuration"),
]

# One interpreter that has imported everything once, and a fork of it for each command.
SERVER = """
import json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
from absl import app
from sapr_jax import main, training
results = []
for arguments in json.load(sys.stdin):
  reader, writer = os.pipe()
  if not os.fork():
    os.dup2(writer, 2)
    status = 99
    try:
      sys.argv = ["main", *arguments]
      app.run(main.main, flags_parser=main._parse_flags)
    except SystemExit as error:
      status = error.code
    except BaseException:
      traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)
  os.close(writer)
  with os.fdopen(reader) as errors:
    text = errors.read()
  results.append([os.waitstatus_to_exitcode(os.wait()[1]), text])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """(exit status, standard error) of each command, and where they ran."""
  folder = tmp_path_factory.mktemp("commands")
  for name, content in (CONFIG_FILES | {name: content for name, (content, _) in CONFIG_ERRORS.items()}).items():
    (folder / f"{name}.py").write_text(content)
  (folder / "cwd").mkdir()
  (folder / "cwd" / "configs").symlink_to(ROOT / "configs")
  commands = [
    [f"--workdir={folder / 'run'}", *(argument.replace("FILES", str(folder)) for argument in arguments)]
    for arguments in [*(row[0] for row in COMMANDS), *([f"--config=FILES/{name}.py"] for name in CONFIG_ERRORS)]
  ]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", SERVER],
    input=json.dumps(commands),
    cwd=folder / "cwd",
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return types.SimpleNamespace(of=json.loads(done.stdout.splitlines()[-1]), folder=folder)


def test_the_command_as_users_start_it(tmp_path):
  arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", "--config.model.nam=resnet8"]
  done = subprocess.run([sys.executable, "-m", "sapr_jax.main", *arguments], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and 'Did you mean "name"' in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number][0])[:60] or "none"
)
def test_a_bad_command_ends_in_one_line(number, answers):
  status, errors = answers.of[number]
  assert re.search(COMMANDS[number][1], errors), errors
  assert errors.startswith("error: ") and errors.count("\n") == 1
  assert status == 2
  assert_nothing_was_written(answers.folder)


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_an_error_in_the_users_configuration_shows_its_traceback_and_one_line(name, answers):
  status, errors = answers.of[len(COMMANDS) + list(CONFIG_ERRORS).index(name)]
  traceback, _, last = errors.rstrip("\n").rpartition("\n")
  assert traceback.startswith("Traceback (most recent call last):")
  assert re.search(CONFIG_ERRORS[name][1], traceback), traceback
  assert last == f"error: {answers.folder / name}.py raised the error above; fix that file."
  assert status == 2
  assert_nothing_was_written(answers.folder)


def assert_nothing_was_written(folder):
  assert not (folder / "run").exists()
  assert [path.name for path in (folder / "cwd").iterdir()] == ["configs"]
