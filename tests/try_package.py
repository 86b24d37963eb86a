"""Installs a wheel or a source distribution in a clean environment, and uses it from an empty folder.

    python tests/try_package.py dist/sapr_jax-0.1.0-py3-none-any.whl

Nothing of the checkout can be imported there, so that what the package lacks shows. `make package` does it for both.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import venv

PROGRAM = """
import importlib.metadata, importlib.resources
import flax.linen as nn, jax, jax.numpy as jnp
import sapr_jax as sapr
from sapr_jax import configs
from sapr_jax.configs import resnet56_cifar10

class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.Conv(8, (3, 3))(nn.relu(nn.Conv(8, (3, 3))(x))).mean(axis=(1, 2)))

model = Net()
variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
graph = sapr.trace_channels(model, variables, (1, 8, 8, 3), select="unjoined")
masks = {group.name: jnp.arange(group.size) % 2 for group in graph.groups}
small_model, small_variables = sapr.prune(model, variables, graph, masks)
assert graph.macs(masks) < 0.5 * graph.macs()
assert small_model.apply(small_variables, jnp.ones((2, 8, 8, 3))).shape == (2, 3)

assert "site-packages" in sapr.__file__, sapr.__file__
assert configs.get("resnet56_cifar10").prune.p == resnet56_cifar10.get_config().prune.p == 0.48
files = importlib.resources.files("sapr_jax")
for name in ("py.typed", "__init__.pyi", "runtime/__init__.pyi", "report/page.html", "configs/default.py"):
  assert files.joinpath(name).is_file(), name
metadata = importlib.metadata.metadata("sapr_jax")
assert metadata["License-Expression"] == "Apache-2.0" and metadata["Version"] == sapr.__version__
assert any(file.name == "LICENSE" for file in importlib.metadata.files("sapr_jax"))
print("imported", sapr.__version__, "from", sapr.__file__)
"""
SHORT = [
  *("--config.train.epochs=2", "--config.train.decay_epochs=()", "--config.prune.start_epoch=1"),
  *("--config.finetune.epochs=1", "--config.finetune.decay_epochs=()", "--config.report.latency_repeats=1"),
]


def main() -> None:
  package = pathlib.Path(sys.argv[1]).resolve()
  environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    (folder / "empty").mkdir()

    def run(*arguments: str | os.PathLike[str]) -> None:
      print("$ python", *arguments[:3], flush=True)
      subprocess.run([python, *arguments], cwd=folder / "empty", env=environment, check=True)

    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{package}[demo,report]")
    run("-c", PROGRAM)
    run("-m", "sapr_jax.main", "--config=digits", "--workdir=run", *SHORT)
    run("-m", "sapr_jax.report", "run")
    subprocess.run([python.parent / "sapr", "inspect", "run/pruned"], cwd=folder / "empty", env=environment, check=True)
    assert (folder / "empty" / "run" / "pruned" / "model.json").is_file()
    assert (folder / "empty" / "run" / "report.html").is_file()


if __name__ == "__main__":
  main()
