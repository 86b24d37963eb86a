"""Files: saved models, checkpoints, records, programs to serve, and weights from and to PyTorch."""

from sapr_jax.artifacts.checkpoint import Checkpointer
from sapr_jax.artifacts.model_card import model_card
from sapr_jax.artifacts.model_info import ModelInfo
from sapr_jax.artifacts.program_files import export
from sapr_jax.artifacts.records import Callback, Recorder, read_records
from sapr_jax.artifacts.saved_model import count_params, load, load_info, save
from sapr_jax.artifacts.torch_weights import export_torch, import_torch
from sapr_jax.artifacts.weights_and_biases import weights_and_biases

__all__ = [
  "Callback",
  "Checkpointer",
  "ModelInfo",
  "Recorder",
  "count_params",
  "export",
  "export_torch",
  "import_torch",
  "load",
  "load_info",
  "model_card",
  "read_records",
  "save",
  "weights_and_biases",
]
