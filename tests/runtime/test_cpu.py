"""What a process does on CPUs: compiler options where JAX knows them, and memory that it keeps."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

from sapr_jax.runtime import cpu


def test_options_depend_on_the_network_and_are_left_out_where_unknown(monkeypatch):
  dense, depthwise = {"kernel": jnp.zeros((3, 3, 4, 8))}, {"kernel": jnp.zeros((3, 3, 1, 8))}
  monkeypatch.setattr(cpu, "_is_known", lambda value: True)
  assert "ELTWISE" in cpu.compiler_options(dense)[cpu._OPTION]
  assert "ELTWISE" not in cpu.compiler_options(depthwise)[cpu._OPTION]
  monkeypatch.setattr(cpu, "_is_known", lambda value: False)
  assert cpu.compiler_options(dense) == {}


def test_an_option_that_jax_refuses_is_unknown(monkeypatch):
  cpu._is_known.cache_clear()
  assert not cpu._is_known("LIBRARY_FUSION_TYPE_OF_ANOTHER_RELEASE")
  monkeypatch.setattr(cpu, "_TRIED_FROM", (99, 0))
  assert not cpu._is_known("LIBRARY_FUSION_TYPE_REDUCE")
  cpu._is_known.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_memory_is_kept():
  program = """
import resource
from sapr_jax.runtime import keep_memory
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  bytearray(100_000_000)[:] = b"x" * 100_000_000
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(keep_memory(), faults() > 10_000, faults() < 1_000)
"""
  environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
  result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
  assert result.stdout.split() == ["True", "True", "True"], result.stderr


def test_an_accelerator_keeps_its_allocator(monkeypatch):
  monkeypatch.setattr(cpu, "_only_cpu", lambda: False)
  assert not cpu.keep_memory()
