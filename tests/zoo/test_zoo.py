"""Networks of other packages are pruned exactly, by the plain call, and the page says of each what is true."""

from __future__ import annotations

import pytest

from tests.zoo.measured import PAGE, TOLERANCE, measure
from tests.zoo.networks import ENTRIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_pruned_exactly(name):
  pytest.importorskip(ENTRIES[name].package, reason="needs pip install 'sapr_jax[zoo]'")
  row = measure(name, ENTRIES[name])
  assert row.error < TOLERANCE
  assert f"| {' | '.join(row.cells)} |" in PAGE.read_text()


def test_the_page_lists_all():
  lines = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
  assert lines[1:] == list(ENTRIES)
