"""The experiments that come with the package; each file is one, over `default.py`, which names every field.

    from sapr_jax import configs

    config = configs.get("resnet56_cifar10")
    config.train.epochs = 10
    print(config)  # name = value, as on the command line

In the repository the files lie in `configs/`, to which `sapr_jax/configs` is a link.
"""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

from ml_collections import ConfigDict

from sapr_jax.errors import InputError

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Returns the names of the experiments, sorted.

  Example:
    >>> names()[:2]
    ['digits', 'mobilenetv2_cifar10']
  """
  return sorted(file.stem for file in _FOLDER.glob("[!_]*.py") if not file.stem.startswith("default"))


def file_of(name: str) -> pathlib.Path | None:
  """Returns the file of an experiment, or of `default` and the like; None if there is none of that name."""
  file = _FOLDER / f"{name}.py"
  return file if name.isidentifier() and not name.startswith("_") and file.is_file() else None


def get(name: str) -> ConfigDict:
  """Returns the configuration of an experiment: its fields can be changed, but none can be added.

  Raises:
    InputError: If there is no such experiment; the message lists those that there are.

  Example:
    >>> get("resnet56_cifar10").prune.p
    0.48
  """
  if not isinstance(name, str) or file_of(name) is None:
    raise InputError(f"an experiment must be one of {', '.join(names())}, got {name!r}.")
  config = importlib.import_module(f"{__name__}.{name}").get_config()
  assert isinstance(config, ConfigDict)
  return config


def about(name: str) -> tuple[str, str]:
  """Returns what an experiment is and how long it takes, in a few words each, from the docstring of its file.

  Example:
    >>> about("resnet50_imagenet")
    ('ResNet-50 on ImageNet', 'not measured; computed, at least 1.4 hours on 8 A100')
  """
  text = ast.get_docstring(ast.parse((_FOLDER / f"{name}.py").read_text())) or ""
  time = re.search(r"^Time: (.+?)( \(docs/.*)?\.$", text, re.MULTILINE)
  return text.splitlines()[0].partition(":")[0], time.group(1) if time else "time not known"


def table() -> str:
  """Returns a line for each experiment: its name, what it is, how long it takes."""
  rows = [(name, *about(name)) for name in names()]
  width = max(len(name) for name, *_ in rows)
  return "\n".join(f"{name:{width}}  {what} ({time})" for name, what, time in rows)


class Experiment(ConfigDict):
  """A configuration that prints as lines `name = value`, with the names that the command line takes."""

  def __str__(self) -> str:
    return "\n".join(_lines(self, ""))


def _lines(config: ConfigDict, prefix: str) -> list[str]:
  lines = []
  for name, value in config.items():
    lines += _lines(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name} = {value!r}"]
  return lines
