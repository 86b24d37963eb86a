"""Compiled programs on disk, so that only the first run of an experiment waits for the compiler."""

from __future__ import annotations

import os
import pathlib
import platform
import sys
import warnings
import zlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

_QUIET_ON_CPU = (0, 10, 2)
"""Releases before it (0.9.1 to 0.10.1 at least) log an error for every program that they load for an AVX-512 CPU."""


def use_compilation_cache() -> pathlib.Path | None:
  """Lets JAX keep what it compiles in the user's cache folder, and take it from there, from now on.

  Does nothing where the user has decided otherwise (`JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE` is
  set), with JAX releases that load programs for CPUs badly, and in runs of several processes: only one of them would
  write, and on GPUs a process that loads a program does not take part in the tuning that the others wait for. A folder
  that cannot be written costs the cache and one line on standard error.

  Returns:
    The folder; None where it did nothing.
  """
  config: Any = jax.config  # most releases do not declare its fields
  if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
    return None
  if jax.distributed.is_initialized() or (jax.default_backend() == "cpu" and jax.__version_info__ < _QUIET_ON_CPU):
    return None
  try:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(f"{folder} cannot be written")
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
    print(f"warning: no compilation cache, every run compiles again: {error}", file=sys.stderr)
    return None
  config.update("jax_compilation_cache_dir", str(folder))
  jax_cache.reset_cache()  # which has decided at the first program of this process whether there is a cache
  # A full disk, or a file that a killed run left half written: JAX compiles instead, and would say so for each program.
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # A start compiles about a hundred small programs besides the steps; together they take as long as a large one.
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return folder


def cache_folder() -> pathlib.Path:
  """Returns `$XDG_CACHE_HOME/sapr_jax/compilation/PROCESSOR`, or the same in `~/.cache`.

  Machines may share a home directory, and JAX does not tell programs for different instruction sets apart.
  """
  given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
  caches = given if given.is_absolute() else pathlib.Path.home() / ".cache"
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
  instructions = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
  return caches / "sapr_jax" / "compilation" / f"{platform.machine()}-{zlib.crc32(instructions.encode()):08x}"
