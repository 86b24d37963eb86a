"""What the README and the guide show runs as it stands."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_example(page, folder):
  """Runs the Python of a page as one script outside the package; returns its lines of output."""
  examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (folder / "example.py").write_text("\n".join(examples))
  done = subprocess.run([sys.executable, "example.py"], cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_the_example_of_the_readme(tmp_path):
  *_, difference, macs = run_example(README, tmp_path)
  assert float(difference) < 1e-4
  dense, small = (int(number) for number in macs.split(" -> "))
  assert 0.4 * dense < small < 0.55 * dense
  assert (tmp_path / "small_net" / "model.json").is_file()


def test_the_page_on_saved_models(tmp_path):
  info, measured = run_example((ROOT / "docs" / "saved_models.md").read_text(), tmp_path)
  assert info.startswith("442400 {'accuracy': 0.5} ['")
  assert "'accuracy': " in measured and "'images': 4" in measured
  card = (tmp_path / "net" / "README.md").read_text()
  assert card.startswith('---\nlicense: "mit"\n') and "# My network" in card


@pytest.mark.slow
def test_the_guide_prunes_a_network_of_ones_own(optimized, tmp_path):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  lines = run_example((ROOT / "docs" / "own_model.md").read_text(), tmp_path)
  first = next(i for i, line in enumerate(lines) if line.startswith("dense "))
  dense, pruned, shares = lines[first : first + 3]
  of_module, energy = lines[first + 3], lines[-1]
  rows = [re.search(r"([\d,]+) MACs +([\d.]+)%", line).groups() for line in (dense, pruned)]
  dense_macs, pruned_macs = (int(macs.replace(",", "")) for macs, _ in rows)
  assert 0.49 * dense_macs < pruned_macs < 0.52 * dense_macs
  dense_accuracy, pruned_accuracy = (float(accuracy) for _, accuracy in rows)
  assert dense_accuracy > 90 and pruned_accuracy > 75
  assert all(0.45 < float(share) <= 0.5 for share in shares.split())
  assert "(budget 50.0%)" in of_module
  assert 2.0 < float(energy.removesuffix(" mJ")) <= 2.2


def test_the_commands_name_fields_that_exist():
  from sapr_jax.configs import resnet56_cifar10

  fields = resnet56_cifar10.get_config()
  named = re.findall(r"--config\.([\w.]+)=", (ROOT / "docs" / "experiments.md").read_text())
  assert len(named) > 5
  for name in named:
    value = fields
    for part in name.split("."):
      assert part in value, name
      value = value[part]


@pytest.mark.parametrize(
  "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
  for link in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", page.read_text()):
    # The reference is made of docstrings when the site is built.
    assert link.startswith("api/") or (page.parent / link).exists(), link
