"""What the training tests share: one whole run."""

import contextlib
import io

import pytest
from small_run import small_config

from sapr_jax import training


@pytest.fixture(scope="session")
def whole_and_log(tmp_path_factory):
  """(work directory, summary, standard output, standard error) of a run that nothing disturbed."""
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  workdir = tmp_path_factory.mktemp("run") / "whole"
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    result = training.run(small_config(), workdir)
  return workdir, result.summary, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def whole(whole_and_log):
  """(work directory, summary) of a run that nothing disturbed."""
  return whole_and_log[:2]
