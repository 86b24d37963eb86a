"""Training: the parts of a run, its steps, and the one loop."""

from sapr_jax.training.config import check_config
from sapr_jax.training.evaluation import evaluate
from sapr_jax.training.experiment import Experiment, build, make_proposer
from sapr_jax.training.latency import measure_latency, read_latency_table, table_for, write_latency_table
from sapr_jax.training.proposers import GeneratorProposer, ImportanceProposer, Proposer
from sapr_jax.training.result import RunResult, load_run
from sapr_jax.training.run import run

__all__ = [
  "Experiment",
  "GeneratorProposer",
  "ImportanceProposer",
  "Proposer",
  "RunResult",
  "build",
  "check_config",
  "evaluate",
  "load_run",
  "make_proposer",
  "measure_latency",
  "read_latency_table",
  "run",
  "table_for",
  "write_latency_table",
]
