"""What the training tests share: one whole run, and what makes the compiler fast."""

import contextlib
import io

import pytest
from jax_options import jax_options
from small_run import small_config

from sapr_jax import training


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Keeps compiled programs, as runs compile the same ones."""
  folder = str(tmp_path_factory.mktemp("cache"))
  with jax_options(jax_compilation_cache_dir=folder, jax_persistent_cache_min_compile_time_secs=0.1):
    yield


@pytest.fixture(scope="session")
def whole_and_log(tmp_path_factory, compilation_cache):
  """(work directory, summary, standard output, standard error) of a run that nothing disturbed."""
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  workdir = tmp_path_factory.mktemp("run") / "whole"
  out, err = io.StringIO(), io.StringIO()
  # Optimized, as runs are that others do: those that must equal it bit for bit run other programs too.
  optimized = jax_options(jax_disable_most_optimizations=False)
  with optimized, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    result = training.run(small_config(), workdir)
  return workdir, result.summary, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def whole(whole_and_log):
  """(work directory, summary) of a run that nothing disturbed."""
  return whole_and_log[:2]
