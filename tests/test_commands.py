"""The command `sapr`: each subcommand through its `main`, on a tiny network, and misuse in one line."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax import __main__ as command, commands
from sapr_jax.method import COSTS, TimedLayer

ROOT = pathlib.Path(__file__).parent.parent
INPUTS = sapr.Inputs((8, 8, 1), mean=[0.3], std=[0.4], class_names=[str(digit) for digit in range(10)])


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
  """A folder with the saved models dense/, pruned/ and bare/, which was saved without its inputs."""
  folder = tmp_path_factory.mktemp("models")
  masks = {group.name: (np.arange(group.size) % 2 == 0).astype(np.float32) for group in tiny.graph.groups}
  known = {"inputs": INPUTS, "metrics": {"accuracy": 0.5, "images": 100}}
  sapr.save(folder / "dense", tiny.model, tiny.variables, **known, config={"data.source": "digits"})
  sapr.save(folder / "pruned", *sapr.prune(tiny.model, tiny.variables, tiny.graph, masks), **known)
  sapr.save(folder / "bare", tiny.model, tiny.variables)
  sapr.export_torch(folder / "weights.safetensors", tiny.model, tiny.variables)
  (folder / "file").write_text("no model")
  about = {"device": "abacus", "batch_size": 1, "dtype": "bfloat16", "inputs": "float32[1,8,8,1]", "macs": 1}
  layers = (TimedLayer("dot", ((),), (), np.array(3.0)),)
  sapr.write_latency_table(folder / "half.json", sapr.LatencyTable(about, {}, layers, 0.0, 1.0, ()))
  return folder


@pytest.fixture
def here(folder, monkeypatch):
  monkeypatch.chdir(folder)
  return folder


@pytest.fixture
def facts(capsys):
  """Runs a command with --json; returns what it prints, which must be all that is on standard output."""

  def run(*arguments):
    assert command.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)

  return run


def test_inspect_shows_a_saved_model(here, tiny, facts, capsys):
  found = facts("inspect", "pruned")
  assert found["macs"] == sapr.load_info("pruned").macs < tiny.graph.macs()
  assert found["metrics"]["accuracy"] == 0.5 and found["inputs"]["mean"] == [0.3]
  first = found["groups"][0]
  assert (first["name"], first["channels"], first["dense_channels"]) == ("stage1_block1/conv1", 2, 4)
  assert first["written_by"] == ["stage1_block1/conv1"] and first["read_by"] == ["stage1_block1/conv2"]
  assert command.main(["inspect", "pruned"]) == 0
  text = capsys.readouterr().out
  assert re.search(r"^stage1_block1/conv1 +2 of 4 +[\d.]+%  conv1 -> conv2$", text, re.MULTILINE)
  assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["resnet8", "digits", str(ROOT / "configs" / "digits.py")])
def test_inspect_shows_a_network_and_an_experiment(name, facts):
  found = facts("inspect", name)
  assert found["input_shape"] == ([32, 32, 3] if name == "resnet8" else [8, 8, 1])
  assert len(found["groups"]) == 3
  # Each layer is read and written by one group alone, so the shares are those of the layers that can be cut.
  shares = sum(group["macs_share"] for group in found["groups"])
  assert shares == pytest.approx(found["prunable_macs"] / found["macs"], abs=1e-5)
  assert any("output" in entry["reason"] for entry in found["fixed"])


def test_evaluate_takes_the_images_of_the_run(here, facts):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  from sapr_jax import data

  found = facts("evaluate", "dense")
  test = data.load_dataset(data.DataSpec("digits")).test
  assert {name: found[name] for name in ("accuracy", "loss", "images")} == sapr.evaluate("dense", data=test)
  assert found["saved_with"] == {"accuracy": 0.5, "images": 100}


def test_prune_cuts_to_the_budget_and_saves_what_is_known(here, tiny, facts, tmp_path):
  out = tmp_path / "small"
  found = facts("prune", "dense", str(out), "--keep", "0.6", "--cost", "params", "--min-width", "2")
  info = sapr.load_info(out)
  assert info.inputs == INPUTS and info.metrics["dense"]["accuracy"] == 0.5
  assert info.params == found["pruned"]["params"] <= 0.6 * tiny.graph.num_params()
  assert all(entry["kept"] >= 2 for entry in found["widths"].values())
  from sapr_jax.method import make_comparable

  graph, defaults = tiny.graph, sapr.Search()
  budget = sapr.params_budget(graph, 0.6)
  how = {"compare": defaults.compare, "cost_exponent": defaults.cost_exponent}
  scores = make_comparable(sapr.l2_norm(tiny.params, graph), graph, budget.cost, **how)
  masks = sapr.project_to_budget(graph, scores, budget, min_width=2)
  want = sapr.prune(tiny.model, tiny.variables, graph, masks)[1]
  jax.tree.map(np.testing.assert_array_equal, sapr.load(out)[1], want)


def test_globs_choose_what_is_shown_and_cut(here, facts, tmp_path):
  globs = ["--include", "stage[12]*", "--exclude", "stage1_block1"]
  assert [group["name"] for group in facts("inspect", "dense", *globs)["groups"]] == ["stage2_block1/conv1"]
  cut = facts("prune", "dense", str(tmp_path / "small"), "--cost", "prunable_macs", *globs)
  assert list(cut["widths"]) == ["stage2_block1/conv1"]


def test_prune_takes_weights_of_pytorch(here, monkeypatch, facts, tmp_path):
  # The network of the fixture, under a name of its own.
  from sapr_jax import models

  monkeypatch.setitem(
    models.MODELS, "narrow8", lambda **fields: models.create("resnet8", width_multiplier=0.25, **fields)
  )
  options = ["--network", "narrow8", "--input-shape", "8x8x1", "--keep", "0.7"]
  found = facts("prune", "weights.safetensors", str(tmp_path / "small"), *options)
  assert found == facts("prune", "dense", str(tmp_path / "other"), "--keep", "0.7") | {
    "out": str(tmp_path / "small"),
    "dense": found["dense"],
  }


@pytest.mark.parametrize("kind", ["stablehlo", "safetensors"])
def test_export_writes_a_program_that_takes_the_inputs_of_the_model(here, facts, tmp_path, kind):
  options = ["--uint8"] if kind == "stablehlo" else []
  found = facts("export", "pruned", str(tmp_path / "net"), "--format", kind, *options)
  file = tmp_path / f"net.{kind}"
  assert found["file"] == str(file) and found["bytes"] == file.stat().st_size
  if kind == "stablehlo":
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    model, variables = sapr.load("pruned")
    want = model.apply(variables, INPUTS.prepare(images))
    got = jax.export.deserialize(bytearray(file.read_bytes())).call(images)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "net.stablehlo.json").read_text())["class_names"] == list(INPUTS.class_names)


def test_benchmark_compares_latency_and_memory(here, facts):
  found = facts("benchmark", "dense", "pruned", "--batch-size", "2", "--repeats", "3")
  assert found["pruned"]["macs"] < found["dense"]["macs"]
  assert found["pruned"]["weight_bytes"] < found["dense"]["weight_bytes"]
  for measured in found["batches"]["2"].values():
    low, high = measured["quartiles_ms"]
    assert 0 < low <= measured["latency_ms"] <= high
  memory = [found["batches"]["2"][name]["memory_bytes"] for name in ("dense", "pruned")]
  assert None in memory or memory[1] < memory[0]


def test_text_for_people_ends_with_one_line_break(here, capsys):
  assert command.main(["export", "dense", "net", "--format", "safetensors"]) == 0
  out = capsys.readouterr().out
  assert re.fullmatch(r"net\.safetensors is written \([\d.]+ KiB\): weights in PyTorch's names\.\n", out)


# ----------------------------------------------------------------------------------------------------------------------
# Misuse
# ----------------------------------------------------------------------------------------------------------------------

MISUSE = [
  ("", r"required: COMMAND; see sapr --help"),
  ("trian digits runs", r"invalid choice: 'trian'"),
  ("inspect", r"required: MODEL\|CONFIG\|NETWORK; see sapr inspect --help"),
  ("inspect nothing", r"'nothing' is no saved model, experiment or network; experiments are digits, "),
  ("inspect nothing.py", r"nothing\.py must be a file, or the name of an experiment"),
  ("inspect .", r"model\.json is missing; \. is not the directory of a saved model"),
  ("inspect bare", r"bare was saved without its inputs; add --input-shape"),
  ("inspect dense --input-shape 9x9x1", r"--input-shape must be left out, as dense was saved with 8x8x1"),
  ("inspect resnet8 --input-shape 8,8", r"must be sizes such as 32x32x3, got '8,8'"),
  ("inspect resnet8 --classes 0", r"num_classes of a CifarResNet must be an integer of at least 1"),
  ("inspect resnet8 --exclude stage9", r"exclude must match .*, got 'stage9', .*; close are stage3_block1/conv2"),
  ("inspect dense --classes 3", r"--classes must be left out for a saved model"),
  ("inspect resnet8 --surplus", r"unrecognized arguments: --surplus"),
  ("evaluate bare", r"bare was saved without its inputs, so how images are normalized is not known"),
  ("evaluate pruned", r"--data or --source is missing, and pruned does not say which images"),
  ("evaluate dense --data nowhere", r"nowhere"),
  ("evaluate dense --data a --source digits", r"not allowed with argument --data"),
  ("evaluate dense --source cifar10", r"--source must be digits, or tfds:NAME such as tfds:cifar10, got 'cifar10'"),
  ("evaluate dense --split val", r"--split must be test or train for digits, got val"),
  ("evaluate dense --split test --batch-size 0", r"batch_size must be an integer of at least 1, got 0"),
  ("prune dense", r"required: OUT"),
  ("prune dense dense", r"OUT must be another directory than MODEL"),
  ("prune dense file", r"file exists and is not a saved model; name a new directory"),
  ("prune dense new --keep 2", r"--keep must be a number in \(0, 1\], got 2\.0; it is the share"),
  ("prune dense new --keep 0.01", r"budget must be at least"),
  ("prune dense new --keep half", r"argument --keep: invalid float value: 'half'"),
  ("prune dense new --cost flops", r"--cost must be one of .*, got 'flops'"),
  ("prune dense new --importance size", r"--importance must be one of .*, got 'size'"),
  ("prune dense new --importance taylor", r"--importance taylor needs images; add --data DIR"),
  ("prune dense new --compare x", r"--compare must be one of .*, got 'x'"),
  ("prune dense new --cost-exponent -1", r"--cost-exponent must be a number of at least 0, got -1\.0"),
  ("prune dense new --cost-exponent inf", r"--cost-exponent must be a number of at least 0, got inf"),
  ("prune dense new --learning-rate nan", r"--learning-rate must be a number above 0, got nan"),
  ("prune dense new --source digits --distill 2", r"--distill must be a number in \[0, 1\], got 2\.0"),
  ("prune dense new --source digits --distill 0.5", r"--distill 0\.5 needs fine-tuning; add --finetune-epochs N"),
  ("prune dense new --distill 0.5", r"--distill needs images"),
  ("prune dense new --seed -1", r"--seed must be at least 0, got -1"),
  ("prune dense new --round-to 0", r"--round-to must be at least 1, got 0"),
  ("prune dense new --finetune-epochs 3", r"--finetune-epochs needs images; add --data DIR or --source NAME"),
  ("prune dense new --fit-batches 3", r"--fit-batches needs images; add --data DIR or --source NAME"),
  ("prune dense new --source digits --fit-batches -1", r"--fit-batches must be at least 0, got -1"),
  ("prune dense new --source digits --finetune-epochs -1", r"--finetune-epochs must be at least 0, got -1"),
  ("prune dense new --source digits --batch-size 0", r"--batch-size must be at least 1, got 0"),
  ("prune dense new --min-width 0", r"--min-width must be at least 1, got 0"),
  ("prune dense new --mean 0.5", r"--mean is for PyTorch weights; add --network"),
  ("prune dense new --network resnet8", r"--network must be left out for dense"),
  ("prune file new", r"file is a file; name its network, such as --network resnet20"),
  ("prune file new --network resnet9", r"The model 'resnet9' is unknown; expected one of"),
  ("prune bare new --input-shape 8x8x1 --source digits", r"bare was saved without its normalization; save it again"),
  ("export dense net", r"FILE must end in \.stablehlo, \.onnx, \.safetensors, got 'net'; or add --format"),
  ("export dense net.onnx --format stablehlo", r"FILE ends in \.onnx and --format is stablehlo"),
  ("export dense net.stablehlo --batch 0", r"batch must be an integer of at least 1, got 0"),
  ("export dense net.stablehlo --dtype int8", r"dtype must be one of floats"),
  ("export dense w.safetensors --uint8", r"preprocess: a \.safetensors file holds weights alone"),
  ("export bare net.onnx --uint8 --input-shape 8x8x1", r"--uint8 needs the normalization of bare"),
  ("benchmark dense", r"required: PRUNED"),
  ("benchmark dense pruned --batch-size 0", r"--batch-size must be at least 1, got 0"),
  ("benchmark dense nothing", r"nothing/model\.json is missing"),
  ("latency nothing new.json", r"'nothing' is no saved model or network; networks are resnet8"),
  ("latency dense nowhere/new.json", r"FILE must be a file in a folder that can be written, got nowhere/new\.json"),
  ("latency dense new.json --batch-size 0", r"batch_size must be an integer of at least 1, got 0"),
  ("latency dense new.json --select all", r"--select must be one of blocks, .*, got 'all'"),
  ("latency dense new.json --classes 3", r"--classes must be left out for a saved model"),
  (
    "prune dense new --latency-table file",
    r"--latency-table must be left out where --cost is macs",
  ),
  (
    "prune dense new --cost latency --latency-table file",
    r"file is damaged or is no latency table: .*; measure it again",
  ),
  ("prune dense new --cost latency --latency-table half.json", r"must be of dtype float32, got bfloat16; measure it"),
  ("report nowhere", r"nowhere"),
  ("train digits", r"required: WORKDIR; see sapr train --help"),
  ("train digits run --set epochs", r"--set must be NAME=VALUE, such as --set train\.epochs=10, got 'epochs'"),
  ("train digits run surplus", r"unexpected argument 'surplus'"),
]


@pytest.mark.parametrize(("line", "message"), MISUSE, ids=[line or "none" for line, _ in MISUSE])
def test_misuse_ends_in_one_line(line, message, here, capsys):
  before = sorted(os.listdir())
  assert command.main(line.split()) == 2
  out, err = capsys.readouterr()
  assert re.search(message, err), err
  assert err.startswith("error: ") and err.count("\n") == 1 and not out
  assert sorted(os.listdir()) == before


# ----------------------------------------------------------------------------------------------------------------------
# As users start it
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *commands.COMMANDS])
def test_help_fits_a_terminal_and_has_examples(name, capsys):
  with pytest.raises(SystemExit) as end:
    command.main([*([name] if name else []), "--help"])
  text = capsys.readouterr().out
  assert end.value.code == 0 and max(map(len, text.splitlines())) <= 100
  page = (ROOT / "docs" / "command_line.md").read_text()
  for known in [name] if name else commands.COMMANDS:
    assert f"`sapr {known} " in page
  assert not name or "examples:\n" in text


def started(*arguments, **options):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, "-m", "sapr_jax", *arguments], env=environment, capture_output=True, text=True, **options
  )


def test_help_imports_nothing_that_is_slow():
  program = "import sys; from sapr_jax import __main__ as c; c.build_parser(); print(*sorted(sys.modules))"
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert not {"jax", "flax", "numpy", "absl", "ml_collections", "optax"} & set(done.stdout.split())


def test_the_help_names_every_cost(capsys):
  with pytest.raises(SystemExit):
    command.build_parser().parse_args(["prune", "--help"])
  (line,) = re.findall(r"--cost COST +([^-]+)", capsys.readouterr().out)
  assert set(re.findall(r"\w+", line)) - {"default"} == COSTS.keys()


def test_training_has_the_messages_and_exit_statuses_of_the_program(tmp_path):
  done = started("train", "digits", "run", "--set", "model.nam=resnet8", cwd=tmp_path)
  assert done.returncode == 2 and 'Did you mean "name"' in done.stderr and done.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_the_version(capsys):
  with pytest.raises(SystemExit) as end:
    command.main(["--version"])
  assert end.value.code == 0 and capsys.readouterr().out == f"sapr {sapr.__version__}\n"


@pytest.mark.slow
def test_a_table_of_latencies_is_a_budget(here, facts, tmp_path):
  found = facts("latency", "dense", str(tmp_path / "times.json"), "--batch-size", "2")
  assert found["batch_size"] == 2 and found["inputs"] == "float32[1,8,8,1]" and len(found["networks"]) == 5
  table = ("--latency-table", str(tmp_path / "times.json"))
  cut = facts("prune", "dense", str(tmp_path / "small"), "--cost", "latency", *table, "--keep", "1.0")
  assert cut["pruned"]["macs"] <= cut["dense"]["macs"]
  assert sapr.load_info(tmp_path / "small").config["prune"]["cost"] == "latency"


@pytest.mark.slow
def test_a_whole_way_from_training_to_a_fine_tuned_network(tmp_path):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  short = ["train.epochs=1", "train.decay_epochs=()", "prune.start_epoch=0", "finetune.epochs=1", "report.page=False"]
  short += ["finetune.decay_epochs=()", "report.latency_repeats=1", "model.width_multiplier=0.5"]
  settings = ["--set", *short]
  done = started("train", "digits", "run", *settings, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  given = ["prune", "run/dense", "small", "--source", "digits", "--finetune-epochs", "1", "--distill", "0.5", "--json"]
  done = started(*given, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)
  assert facts["pruned"]["macs"] <= 0.5 * facts["dense"]["macs"]
  assert json.loads((tmp_path / "small.run" / "config.json").read_text())["finetune.distillation.weight"] == 0.5
  assert sapr.load_info(tmp_path / "small").metrics["accuracy"] == facts["pruned"]["accuracy"]
  assert started("report", "run", cwd=tmp_path).returncode == 0 and (tmp_path / "run" / "report.html").is_file()
  # The reader of a pipe may go.
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as closed:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    gone = [sys.executable, "-m", "sapr_jax", "inspect", "run/pruned"]
    assert subprocess.run(gone, cwd=tmp_path, env=environment, stdout=closed).returncode == 0


@pytest.mark.slow
def test_a_signal_is_heard_while_training_starts(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-m", "sapr_jax", "train", "digits", "run"],
    cwd=tmp_path,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )
  time.sleep(1.5)  # in the middle of its imports
  process.terminate()
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75, errors
