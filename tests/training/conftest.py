"""What the training tests share: one whole run, and a compilation cache, as runs compile the same programs."""

import contextlib
import io

import jax
import pytest
from small_run import small_config

from sapr_jax import training


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="session")
def whole_and_log(tmp_path_factory, compilation_cache):
  """(work directory, summary, standard output, standard error) of a run that nothing disturbed."""
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  workdir = tmp_path_factory.mktemp("run") / "whole"
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    summary = training.run(small_config(), workdir)
  return workdir, summary, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def whole(whole_and_log):
  """(work directory, summary) of a run that nothing disturbed."""
  return whole_and_log[:2]
