"""Figures and page of runs, from the records of made-up ones."""

from __future__ import annotations

import html
import json
import re
import runpy
import sys

import pytest

from sapr_jax.errors import InputError
from sapr_jax.report.figures import FIGURES
from sapr_jax.report.page import write_page
from sapr_jax.report.run_history import read_histories

for package in ("jinja2", "matplotlib"):
  pytest.importorskip(package, reason=f"the report needs {package}: pip install 'sapr_jax[report]'")


def make_run(path, *, gamma=0.01, seed=0, epochs=4, finished=True, searched=True):
  path.mkdir()
  config = {
    "model.name": "resnet8", "prune.gamma": gamma, "prune.p": 0.5, "prune.start_epoch": 1, "train.epochs": 3,
    "seed": seed, "data.path": None,
  }  # fmt: skip
  (path / "config.json").write_text(json.dumps(config))
  records = []
  for step in range(1, epochs + 1):
    stage = "train" if step <= 3 else "finetune"
    record = {"stage": stage, "epoch": step if step <= 3 else step - 3, "step": step, "test_accuracy": 0.2 * step}
    if searched and 1 < step <= 3:
      record |= {"subnetwork_accuracy": 0.1 * step, "cost": "macs", "cost_share": 0.5, "generator_cost_share": 0.6}
      record |= {"kept_norm_mean": 1.0, "dropped_norm_mean": 1 / step, "widths": {"a/conv": 2, "b/conv": step}}
    if searched and step == 3:
      record["hamming_distance"] = 0.25
    records.append(record)
  (path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  (path / "network.json").write_text(json.dumps({"groups": {"a/conv": 4, "b/conv": 8}}))
  if finished:
    entry = {"accuracy": 0.8125, "macs": 1_000_000, "params": 1234, "latency_ms": {"1": 0.5}}
    small = entry | {"macs": 481_000, "params": 600}
    run = {"versions": {"jax": "1.2.3"}, "device": "test device"}
    (path / "summary.json").write_text(json.dumps({"dense": entry, "subnetwork": small, "pruned": small, "run": run}))
  return path


def test_a_page_of_several_runs_has_everything_in_one_file(tmp_path):
  paths = [make_run(tmp_path / "strong", gamma=0.1), make_run(tmp_path / "none", gamma=0.0)]
  runs = read_histories(paths)
  assert [run.label for run in runs] == ["gamma 0", "gamma 0.1"]
  page = write_page(runs, tmp_path / "out").read_text()
  assert "<h1>Pruning of resnet8</h1>" in page
  for text in ("81.25%", "0.481 M", "48.1%", "1,234", "1.00x", "jax 1.2.3", "test device", "prune.start_epoch"):
    assert text in page, text
  assert page.count('<div class="tiles">') == page.count("<h3>") == 2
  assert not re.findall(r'(?:src|href)="(?!#)', page)  # self-contained
  files = {file.stem: file.read_bytes() for file in (tmp_path / "out" / "figures").glob("*.png")}
  assert sorted(files) == sorted(FIGURES)
  assert all(content.startswith(b"\x89PNG") for content in files.values())
  captions = [html.escape(drawing.caption) for drawing in FIGURES.values()]
  assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == captions
  assert re.findall(r'<svg role="img" aria-label="(.*?)"', page) == captions
  assert not re.findall("#0072b2|#333333", page.split("<main>")[1])  # the figures have the colours of the page
  assert str(tmp_path) not in page


def test_what_the_figures_show(tmp_path):
  (run,) = read_histories([make_run(tmp_path / "run")])

  def lines(name):
    (axes,) = FIGURES[name].draw([run]).axes
    return [
      (line.get_xdata(), line.get_ydata()) for line in axes.lines if line.get_label().startswith(("run", "_child0"))
    ]

  ((epochs, values),) = lines("subnetwork_accuracy")
  assert (list(epochs), list(values)) == ([2, 3], pytest.approx([20, 30]))
  ((epochs, values),) = lines("hamming_distance")
  assert (list(epochs), list(values)) == ([3], [25])
  (axes,) = FIGURES["kept_channels"].draw([run]).axes
  assert [bar.get_height() for bar in axes.patches] == [4, 8, 2, 3]
  assert [label.get_text() for label in axes.get_xticklabels()] == ["a/conv", "b/conv"]


def test_channels_of_another_network_are_no_channels_of_the_first(tmp_path):
  first, second = make_run(tmp_path / "first", seed=0), make_run(tmp_path / "second", seed=1)
  records = (second / "records.jsonl").read_text()
  (second / "records.jsonl").write_text(records.replace("b/conv", "c/conv"))
  (axes,) = FIGURES["kept_channels"].draw(read_histories([first, second])).axes
  assert [bar.get_height() for bar in axes.patches] == [4, 8, 2, 3]
  assert axes.get_title(loc="left") == "Kept channels (without runs of other networks)"


def test_a_run_that_measured_less_is_reported_with_what_it_has(tmp_path):
  # A network that was trained from scratch, and one of an alternative.
  run, other = make_run(tmp_path / "narrow", seed=0, searched=False), make_run(tmp_path / "other", seed=1)
  summary = json.loads((run / "summary.json").read_text())
  del summary["subnetwork"], summary["pruned"]["latency_ms"], summary["pruned"]["params"]
  summary["dense"] = {"macs": 1_000_000}
  (run / "summary.json").write_text(json.dumps(summary))
  page = write_page(read_histories([run, other]), tmp_path / "out").read_text()
  rows = [re.findall(r"<td data-name=\"(.*?)\">(.*?)</td>", row) for row in re.findall("<tr>.*</tr>", page)]
  (row,) = [row for row in rows if ("run", "seed 0") in row]
  assert [cell for _, cell in row[2:]] == ["81.25%", "0.481 M", "48.1%", "", "", ""]
  assert sum(("run", "seed 1") in row for row in rows) == 3 and row[-2][0] == "ms, batch 1"
  assert "<b>81.25%</b><span>accuracy</span><small>of the pruned network</small>" in page


def test_a_run_under_way_is_reported_as_far_as_it_is(tmp_path):
  runs = read_histories([make_run(tmp_path / "run", epochs=1, finished=False, searched=False)])
  page = write_page(runs, tmp_path / "out").read_text()
  assert "Not finished yet: run." in page and "Results" not in page
  assert [file.name for file in (tmp_path / "out" / "figures").iterdir()] == ["full_model_accuracy.png"]


def test_seeds_are_told_apart_and_text_is_escaped(tmp_path):
  runs = read_histories([make_run(tmp_path / "b", seed=1), make_run(tmp_path / "<i>", seed=0)])
  assert [run.label for run in runs] == ["seed 0", "seed 1"]
  same = [make_run(tmp_path / "<b>x"), make_run(tmp_path / "y")]
  assert "&lt;b&gt;x" in write_page(read_histories(same), tmp_path / "out").read_text()
  alike = [make_run(tmp_path / "y" / "seed_0"), make_run(tmp_path / "<b>x" / "seed_0")]
  assert [run.label for run in read_histories(alike)] == ["y/seed_0", "<b>x/seed_0"]
  assert [run.label for run in read_histories([same[1], same[1]])] == ["y", "y"]


def test_a_budget_given_as_an_amount_has_no_line_of_its_share(tmp_path):
  run = make_run(tmp_path / "run")
  (before,) = FIGURES["budget"].draw(read_histories([run])).axes
  config = json.loads((run / "config.json").read_text()) | {"prune.limit": 30e6}
  (run / "config.json").write_text(json.dumps(config))
  (after,) = FIGURES["budget"].draw(read_histories([run])).axes
  assert [text.get_text() for text in before.texts] == ["p = 0.5"] and not after.texts


def test_a_legend_names_only_curves_that_are_there(tmp_path):
  run = make_run(tmp_path / "run")
  records = (run / "records.jsonl").read_text()

  def legend(name, *paths):
    figure = FIGURES[name].draw(read_histories(paths))
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]

  assert legend("budget", run) == ["chosen", "the generator's random samples"]
  (run / "records.jsonl").write_text(records.replace("generator_cost_share", "nothing"))
  assert legend("budget", run) == ["chosen"]
  assert legend("full_model_accuracy", run) == []
  assert legend("alignment", run, make_run(tmp_path / "other", seed=1)) == ["seed 0", "seed 1", "dropped", "kept"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch, package):
  runs = read_histories([make_run(tmp_path / "run")])
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(InputError, match=rf"needs {package}, .*; run: pip install 'sapr_jax\[report\]'"):
    write_page(runs, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_directory_without_a_run_is_refused(tmp_path):
  for name, content in (("empty", None), ("other", "{}"), ("damaged", "{")):
    (tmp_path / name).mkdir()
    if content:
      (tmp_path / name / "config.json").write_text(content)
    with pytest.raises(InputError, match=rf"{name} is not the work directory of a run"):
      read_histories([tmp_path / name])
  run = make_run(tmp_path / "new", epochs=0, finished=False)
  with pytest.raises(InputError, match="has no records yet"):
    read_histories([run])
  (run / "summary.json").write_text("{}")
  with pytest.raises(InputError, match="trained for no epoch, so there is nothing to draw"):
    read_histories([run])


def test_the_command(tmp_path, monkeypatch, capsys):
  def status(*arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "sapr_jax.report.__main__", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit) as done:
      runpy.run_module("sapr_jax.report", run_name="__main__")
    return done.value.code

  make_run(tmp_path / "run")
  assert status(tmp_path / "run") == 0
  assert (tmp_path / "run" / "report.html").is_file() and not capsys.readouterr().err
  make_run(tmp_path / "other", seed=1)
  assert status(tmp_path / "run", tmp_path / "other") == 0
  assert (tmp_path / "run" / "comparison" / "report.html").is_file()
  assert status(tmp_path / "nothing") == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
