"""The picture of docs/architecture.md, held against the imports of the code."""

from __future__ import annotations

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ARROWS = {
  "errors": set(),
  "version": set(),
  "checks": {"errors"},
  "channels": {"checks", "errors"},
  "models": {"checks", "errors"},
  "method": {"channels", "checks", "errors"},
  "data": {"checks", "errors"},
  "artifacts": {"channels", "checks", "data", "errors", "models", "version"},
  "report": {"artifacts", "errors", "models", "version"},
  "runtime": {"models", "errors", "version"},
  "training": {"artifacts", "channels", "checks", "data", "errors", "method", "models", "report", "runtime"},
  "configs": {"errors"},
  "main": {"configs", "errors", "runtime", "training"},
  "commands": {
    *("artifacts", "channels", "configs", "data", "errors", "main", "method", "models", "report", "runtime"),
    *("training", "version"),
  },
  "__main__": {"commands", "errors", "runtime"},
  "__init__": {"artifacts", "channels", "configs", "data", "errors", "method", "models", "training", "version"},
}
"""Folder or file of `sapr_jax` -> those that it may import."""


def module_name(file: pathlib.Path) -> str:
  parts = file.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [file for folder in ("sapr_jax", "study", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
FILES += (ROOT / "sapr_jax" / "configs").glob("*.py")  # a link, which rglob does not follow
MODULES = {module_name(file): file for file in FILES}


def imports(file: pathlib.Path, *, late: bool = True) -> set[str]:
  """Returns the modules of this repository that a file imports; unless `late`, only those imported with it."""
  stub = file.with_suffix(".pyi")  # of a package that imports what it offers when it is used
  tree, found = ast.parse((stub if stub.exists() else file).read_text()), set()
  for node in ast.walk(tree) if late else tree.body:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      module = ".".join(filter(None, [module_name(file) if node.level else "", node.module]))
      names = {f"{module}.{alias.name}" for alias in node.names}
      found |= (names & MODULES.keys()) | ({module} if names - MODULES.keys() else set())
  return found & MODULES.keys()


def room(module: str) -> str:
  return module.split(".")[1] if "." in module else "__init__"


def test_every_import_of_the_package_is_an_arrow_of_the_picture():
  checked = 0
  for module, file in MODULES.items():
    if not module.startswith("sapr_jax"):
      continue
    for imported in imports(file):
      checked += 1
      assert imported.startswith("sapr_jax"), f"{module} imports {imported}"
      allowed = ARROWS[room(module)] | {room(module)}
      assert room(imported) in allowed, f"{module} imports {imported}, against docs/architecture.md"
  assert checked > 100


def test_measurements_know_nothing_of_the_study():
  found = {module: imports(file) for module, file in MODULES.items() if module.startswith("benchmarks.")}
  assert found and not any(name.startswith("study") for names in found.values() for name in names)


def test_no_two_files_import_each_other_in_a_circle():
  # A package's __init__ offers what its files define; a file may import another through it.
  graph = {module: imports(file, late=False) - {module} for module, file in MODULES.items()}
  assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_page_names_files_that_exist():
  text = (ROOT / "docs" / "architecture.md").read_text()
  names = {word.split("`")[0] for word in text.split("`")[1::2]}
  files = [name for name in names if name.endswith(".py") and "NAME" not in name]
  assert len(files) > 15
  for name in files:
    candidates = [ROOT / name, ROOT / "sapr_jax" / name, *(ROOT / "sapr_jax").glob(f"*/{name}")]
    assert any(path.is_file() for path in candidates), name


@pytest.mark.parametrize("folder", ["channels", "method"])
def test_the_library_reads_no_file_and_no_configuration(folder):
  for file in (ROOT / "sapr_jax" / folder).glob("*.py"):
    text = file.read_text()
    assert "ml_collections" not in text and "open(" not in text and "import pathlib" not in text, file
