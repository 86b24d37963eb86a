"""What a run gives back, whom it calls meanwhile, and where it can be started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import threading

import pytest
from small_run import check_same_run, small_config

import sapr_jax as sapr
from sapr_jax import artifacts, report, training

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")


def test_a_finished_run_has_its_numbers_and_networks(whole):
  result = sapr.load_run(str(whole[0]))
  assert (result.workdir, result.summary) == whole
  assert result.records == artifacts.read_records(whole[0]) and len(result.records) == 6
  for (model, variables), name in ((result.dense, "dense"), (result.pruned, "pruned")):
    assert sapr.count_macs(model, variables, (1, 8, 8, 1)) == result.summary[name]["macs"]
  assert result.pruned is result.pruned  # read once
  assert repr(result) == f"RunResult of {whole[0]}\n\n{report.format_summary(whole[1])}"
  page = result._repr_html_()
  assert page.count("<tr>") == 4 and "<td>pruned, after fine-tuning</td>" in page


def test_the_records_as_a_table(whole, monkeypatch):
  monkeypatch.setitem(sys.modules, "pandas", None)
  with pytest.raises(sapr.InputError, match=r"needs pandas, which is not installed; run: pip .*'sapr_jax\[notebook\]'"):
    sapr.load_run(whole[0]).frame()
  monkeypatch.undo()
  pytest.importorskip("pandas", reason="a frame needs pandas: pip install 'sapr_jax[notebook]'")
  frame = sapr.load_run(whole[0]).frame()
  assert frame["step"].tolist() == [1, 2, 3, 4, 5, 6]
  assert frame["subnetwork_accuracy"].isna().tolist() == [True, False, False, False, True, True]


def test_the_figures_of_a_run(whole):
  pytest.importorskip("matplotlib", reason="figures need pip install 'sapr_jax[report]'")
  figures = sapr.load_run(whole[0]).figures()
  assert "alignment" in figures and "kept_channels" in figures
  assert figures._repr_html_().count("<svg") == len(figures)
  # IPython asks the objects of a class without a printer of its own.
  assert figures["alignment"]._repr_png_().startswith(b"\x89PNG")


def test_what_is_no_finished_run_is_refused(whole, tmp_path):
  with pytest.raises(sapr.InputError, match=r"nothing is not the work directory of a run: it has no config\.json"):
    sapr.load_run(tmp_path / "nothing")
  shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("summary.json", "checkpoints"))
  with pytest.raises(sapr.InputError, match="run holds a run that has not finished, or has lost its results"):
    sapr.load_run(tmp_path / "run")
  for function in (sapr.load_run, lambda path: sapr.run(small_config(), path)):
    with pytest.raises(sapr.InputError, match="workdir must be the path of a work directory, got 3"):
      function(3)
  for callbacks in (3, [3], print):
    with pytest.raises(sapr.InputError, match="callbacks must be a list of functions that take a record, got"):
      sapr.run(small_config(), tmp_path / "new", callbacks=callbacks)
  assert not (tmp_path / "new").exists()


@pytest.fixture
def finished(whole, tmp_path):
  """A copy of the finished run."""
  return shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))


def test_the_page_is_written_and_named_at_the_end(finished, capsys):
  for package in ("jinja2", "matplotlib"):
    pytest.importorskip(package, reason="the report needs pip install 'sapr_jax[report]'")
  training.run(small_config(report__page=True), str(finished))
  assert "<h1>Pruning of tiny</h1>" in (finished / "report.html").read_text()
  *_, page, model = capsys.readouterr().out.splitlines()
  assert page.endswith(f" {finished / 'report.html'}")
  assert f" {finished / 'pruned'} " in model


@pytest.mark.parametrize("problem", [sapr.InputError("The report needs x\nand y"), RuntimeError("no fonts")])
def test_a_page_that_cannot_be_written_is_no_failure(finished, monkeypatch, capsys, problem):
  def fail(*arguments):
    raise problem

  monkeypatch.setattr(report, "write_page", fail)
  result = training.run(small_config(report__page=True), finished)
  assert result.summary["pruned"]["accuracy"] > 0
  out, err = capsys.readouterr()
  assert err.startswith(f"note: {finished / 'report.html'} is not written: ") and err.count("\n") == 1
  assert "report.html" not in out and str(finished / "pruned") in out


@pytest.mark.slow
def test_callbacks_get_the_records_and_their_errors_lose_nothing(whole, tmp_path, monkeypatch):
  """The first part in a thread, as a server would; the second in a running event loop, as a notebook has."""
  seen, caught = [], []

  def watch(record):
    seen.append(dict(record))
    with pytest.raises(TypeError):
      record["loss"] = 0.0
    if record["step"] == 3:
      raise RuntimeError("the dashboard has gone")

  def start():
    try:
      training.run(small_config(), tmp_path / "run", callbacks=[watch])
    except RuntimeError as error:
      caught.append(str(error))

  thread = threading.Thread(target=start)
  thread.start()
  thread.join()
  assert caught == ["the dashboard has gone"]
  assert seen == artifacts.read_records(tmp_path / "run") and len(seen) == 3

  later, opened = [], []

  @contextlib.contextmanager
  def dashboard(path, project, config):
    opened.append((path, project, config["train.epochs"]))
    yield later.append
    opened.append("closed")

  monkeypatch.setattr(artifacts, "weights_and_biases", dashboard)

  async def cell():
    return training.run(small_config(report__wandb_project="digits"), str(tmp_path / "run"))

  result = asyncio.run(cell())
  assert opened == [(tmp_path / "run", "digits", 4), "closed"]
  assert [record["step"] for record in later] == [4, 5, 6]  # the third epoch is not done again
  assert [*seen, *map(dict, later)] == result.records
  check_same_run(tmp_path / "run", whole[0])


def test_a_run_keeps_compiled_programs_unless_told_not_to(finished, monkeypatch):
  calls = []
  monkeypatch.setattr(sys.modules["sapr_jax.training.run"], "use_compilation_cache", lambda: calls.append(1))
  training.run(small_config(), finished, compilation_cache=False)
  assert calls == []
  training.run(small_config(), finished)
  assert calls == [1]


def test_the_result_of_a_call_is_that_of_the_directory(finished):
  assert training.run(small_config(), finished) == training.RunResult.of(finished)
  assert json.loads((finished / "summary.json").read_text()) == training.RunResult.of(finished).summary
