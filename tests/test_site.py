"""The pages of the site that are written by hand are true, and the site builds without a warning."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from test_readme import run_example

from sapr_jax import configs, main

ROOT = pathlib.Path(__file__).parent.parent
COMMAND_LINE = (ROOT / "docs" / "command_line.md").read_text()


def test_the_page_on_the_command_line_has_every_option_and_no_other():
  defined = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]}
  training = COMMAND_LINE.partition("\n## Training")[2].partition("\n## ")[0]
  named = set(re.findall(r"`--(?:no)?(\w+)`", training))
  assert named == defined > {"config", "workdir"}


def test_the_page_on_the_command_line_has_every_exit_status():
  rows = re.findall(r"^\| (\d+) \|", COMMAND_LINE, re.MULTILINE)
  assert rows == ["0", "2", "3", "75", "130"]
  assert sorted(rows) == sorted(re.findall(r"^    (\d+) +\w", main.__doc__, re.MULTILINE))


def test_the_page_on_the_command_line_has_every_experiment():
  rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./configs/(\w+)\.py\)", COMMAND_LINE, re.MULTILINE)
  assert sorted(name for name, _ in rows) == configs.names()
  assert all(name == file for name, file in rows)


def test_the_page_on_the_command_line_has_the_options_of_the_report(monkeypatch, capsys):
  from sapr_jax.report import __main__ as report

  monkeypatch.setattr("sys.argv", ["report", "--help"])
  with pytest.raises(SystemExit):
    report.main()
  options = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
  assert options == set(re.findall(r"--\w+", COMMAND_LINE.partition("\n## Figures")[2].partition("\n## ")[0]))


def test_the_experiment_of_ones_own(tmp_path):
  example = re.search(r"```python\n(.*?)```", COMMAND_LINE, re.DOTALL).group(1)
  names = {}
  exec(example, names)
  assert names["get_config"]().prune.p == 0.3


@pytest.mark.slow
def test_the_example_of_the_quickstart(tmp_path):
  *_, macs, shape = run_example((ROOT / "docs" / "quickstart.md").read_text(), tmp_path)
  dense, small = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", macs))
  assert 0.4 * dense < small < 0.55 * dense
  assert shape == "(1, 10)"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  pytest.importorskip("mkdocs", reason="the site needs pip install 'sapr_jax[docs]'")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "api" / "method" / "index.html").read_text()
  assert 'id="sapr_jax.partial_group_lasso"' in page and "&gt;&gt;&gt;" in page
  assert (tmp_path / "source" / "configs" / "digits.py" / "index.html").is_file()
