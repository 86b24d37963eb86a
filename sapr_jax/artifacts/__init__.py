"""Files: saved models, checkpoints, records, programs to serve, and weights from and to PyTorch."""

from sapr_jax.artifacts.checkpoint import Checkpointer
from sapr_jax.artifacts.program_files import export
from sapr_jax.artifacts.records import Recorder, read_records
from sapr_jax.artifacts.saved_model import count_params, load, save
from sapr_jax.artifacts.torch_weights import export_torch, import_torch

__all__ = [
  "Checkpointer",
  "Recorder",
  "count_params",
  "export",
  "export_torch",
  "import_torch",
  "load",
  "read_records",
  "save",
]
