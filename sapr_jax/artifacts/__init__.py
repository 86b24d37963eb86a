"""What a run leaves on disk: saved models, checkpoints, records."""

from sapr_jax.artifacts.checkpoint import Checkpointer
from sapr_jax.artifacts.records import Recorder, read_records
from sapr_jax.artifacts.saved_model import count_params, load, save

__all__ = ["Checkpointer", "Recorder", "count_params", "load", "read_records", "save"]
