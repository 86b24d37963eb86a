"""Pages of the site beside those of `docs/`: the API, from docstrings, and linked files of the repository.

A page may link to any file of the repository as it does on a code host, such as `[digits](../configs/digits.py)`; the
site shows the file on a page of its own, as no address of a repository is needed then. A link to a folder becomes text.
"""

from __future__ import annotations

import ast
import pathlib
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "sapr_jax"
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([\w./-]+)(#[\w-]+)?\)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".toml": "toml", ".yml": "yaml"}

_API = {
  "channels": "Channels",
  "method": "Method",
  "models": "Models",
  "artifacts": "Artifacts",
  "training": "Training",
  "configs": "Configurations",
  "errors": "Errors",
}
"""Folder or file of the package -> title of its page."""


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages."""
  for name, title in _API.items():
    files.append(File.generated(config, f"api/{name}.md", content=f"# {title}\n\n{_api(name)}"))
  linked = {path for file in files.documentation_pages() for _, path, _ in _LINK.findall(file.content_string)}
  for path in sorted(linked):
    if not (ROOT / path).exists():
      raise PluginError(f"a page of docs/ links to ../{path}, which is not there")
    if (ROOT / path).is_file():
      files.append(File.generated(config, f"source/{path}.md", content=_source(path)))
  return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
  """Leads links to files of the repository to their pages."""

  def link(match: re.Match[str]) -> str:
    text, path, _ = match.groups()
    return f"[{text}](source/{path}.md)" if (ROOT / path).is_file() else text

  return markdown if page.file.src_uri.startswith("source/") else _LINK.sub(link, markdown)


def _source(path: str) -> str:
  text, suffix = (ROOT / path).read_text(), pathlib.Path(path).suffix
  front = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
  if suffix == ".md":  # links into docs/ are kept, others become text
    text = re.sub(r"\]\(docs/", "](../" + "../" * path.count("/"), text)
    return front + re.sub(r"\[([^\]]+)\]\((?!\w+:|\.\./|#)[^)]*\)", r"\1", text)
  return f"{front}# `{path}`\n\n````{_LANGUAGES.get(suffix, 'text')}\n{text.rstrip()}\n````\n"


def _api(name: str) -> str:
  """Returns what mkdocstrings makes the page of: the module, then its public names, a section for each file."""
  head = _directive(f"sapr_jax.{name}", members=False, show_root_heading=False, show_root_toc_entry=False)
  files, sections = _imported(PACKAGE / name / "__init__.py"), dict[str, list[str]]()
  for public in _public(name):
    sections.setdefault(files.get(public, "").rpartition(".")[2], []).append(public)
  for file, names in sections.items():
    head += f"## {file.replace('_', ' ').capitalize()}\n\n" if file else ""
    for public in sorted(names, key=lambda public: not public[0].isupper()):
      head += _directive(f"sapr_jax.{public}" if public in _offered(name) else f"sapr_jax.{name}.{public}")
  return head


def _directive(path: str, **options: bool) -> str:
  lines = [f"::: {path}", *(["    options:"] if options else [])]
  return "\n".join([*lines, *(f"      {name}: {str(value).lower()}" for name, value in options.items())]) + "\n\n"


def _offered(name: str) -> list[str]:
  """Returns what `sapr_jax` itself offers of a folder."""
  tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
  return [a.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == name for a in n.names]


def _public(name: str) -> list[str]:
  """Returns the public names: what `sapr_jax` offers, or else `__all__`, or else what the file defines."""
  if offered := _offered(name):
    return offered
  file = PACKAGE / name / "__init__.py"
  tree = ast.parse((file if file.exists() else PACKAGE / f"{name}.py").read_text())
  for node in tree.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
      return list(ast.literal_eval(node.value))
  defined = (node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
  return [public for public in defined if not public.startswith("_")]


def _imported(file: pathlib.Path) -> dict[str, str]:
  """Returns name -> module that an `__init__.py` has it from."""
  if not file.exists():
    return {}
  nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
  return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}
