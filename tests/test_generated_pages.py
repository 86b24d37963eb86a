"""The pages that are generated from `results/` are what their generators make of it."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks import performance_page
from study import page as study_page

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_the_page_on_performance():
  assert performance_page.PAGE.read_text() == performance_page.text()


def test_the_page_on_the_study(tmp_path):
  pytest.importorskip("matplotlib", reason="figures need pip install 'sapr_jax[report]'")
  study_page.renew(study_page.RESULTS, tmp_path / "results.md")
  assert study_page.PAGE.read_text() == (tmp_path / "results.md").read_text()
