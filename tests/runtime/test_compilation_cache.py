"""The compilation cache: on by default, where the user says, and never in the way of a run."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from sapr_jax.runtime import compilation_cache, use_compilation_cache

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


@pytest.fixture
def caches(tmp_path, monkeypatch):
  """The user's cache folder, in a process whose user has set nothing."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(compilation_cache, "_QUIET_ON_CPU", (0, 0, 0))  # whatever JAX is installed
  jax_cache.reset_cache()
  with warnings.catch_warnings():
    yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def compile_something():
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # however quick the compiler is
  return jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((7, 7)))


def test_programs_are_kept_in_the_users_cache_folder(caches):
  folder = use_compilation_cache()
  assert folder.parent == caches / "sapr_jax" / "compilation"
  assert jax.config.jax_compilation_cache_dir == str(folder)
  compile_something()
  assert any(path.name.startswith("jit__lambda") for path in folder.iterdir())


def test_a_damaged_program_is_compiled_again_without_a_word(caches):
  folder = use_compilation_cache()
  want = compile_something()
  for path in folder.iterdir():
    path.write_bytes(path.read_bytes()[:100])
  jax.clear_caches()
  assert (compile_something() == want).all()


def test_a_folder_of_the_users_choice_is_respected(caches):
  jax.config.update("jax_compilation_cache_dir", str(caches / "mine"))
  assert use_compilation_cache() is None
  assert jax.config.jax_compilation_cache_dir == str(caches / "mine")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
  assert not (caches / "sapr_jax").exists()


def test_a_user_who_wants_no_cache_gets_none(caches):
  jax.config.update("jax_enable_compilation_cache", False)
  assert use_compilation_cache() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_several_processes_do_without(caches, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert use_compilation_cache() is None


def test_releases_that_load_programs_badly_do_without(caches, monkeypatch):
  monkeypatch.setattr(compilation_cache, "_QUIET_ON_CPU", (99, 0, 0))
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert use_compilation_cache() is None


def test_a_folder_that_cannot_be_made_costs_one_line(caches, capsys):
  (caches / "sapr_jax").write_text("a file is in the way")
  assert use_compilation_cache() is None
  assert jax.config.jax_compilation_cache_dir is None
  errors = capsys.readouterr().err
  assert errors.startswith("warning: no compilation cache, ") and errors.count("\n") == 1


def test_without_xdg_cache_home_it_is_in_the_home_directory(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "relative paths count for nothing")
  monkeypatch.setenv("HOME", "/home/somebody")
  folder = compilation_cache.cache_folder()
  assert folder.parent == pathlib.Path("/home/somebody/.cache/sapr_jax/compilation")


DRIVER = """
import sys, jax
from absl import app
import sapr_jax.training
from sapr_jax import main
from sapr_jax.runtime import compilation_cache
def begin(config, path):
  print(jax.config.jax_compilation_cache_dir)
  sys.exit()
sys.modules["sapr_jax.training.run"]._settings = begin
compilation_cache._QUIET_ON_CPU = (0, 0, 0)
assert jax.config.jax_compilation_cache_dir is None  # importing the package changes nothing
app.run(main.main, flags_parser=main._parse_flags)
"""


@pytest.mark.parametrize(("flags", "kept"), [([], True), (["--nocompilation_cache"], False)])
def test_the_flag(flags, kept, tmp_path):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-c", DRIVER, "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", *flags]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(str(tmp_path / "sapr_jax")) if kept else done.stdout == "None\n"
  assert (tmp_path / "sapr_jax").is_dir() == kept
