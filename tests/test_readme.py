"""What the README shows runs as it stands."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs_from_outside_the_package(tmp_path):
  (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  (tmp_path / "example.py").write_text(example)
  done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  difference, macs = done.stdout.splitlines()[-2:]
  assert float(difference) < 1e-4
  dense, small = (int(number) for number in macs.split(" -> "))
  assert 0.4 * dense < small < 0.55 * dense
  assert (tmp_path / "small_net" / "model.json").is_file()


def test_the_commands_name_fields_and_files_that_exist():
  from configs import resnet56_cifar10

  fields = resnet56_cifar10.get_config()
  named = re.findall(r"--config\.([\w.]+)=", README)
  assert len(named) > 5
  for name in named:
    value = fields
    for part in name.split("."):
      assert part in value, name
      value = value[part]
  root = pathlib.Path(__file__).parent.parent
  for link in re.findall(r"\]\(([\w./]+)\)", README):
    assert (root / link).exists(), link
