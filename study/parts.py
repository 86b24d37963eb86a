"""Parts of a training run that the study uses by themselves, without the run around them."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from sapr_jax import artifacts, training
from sapr_jax.channels import Masks
from sapr_jax.errors import InputError
from sapr_jax.method import Scores
from sapr_jax.runtime import Interruption, replicate
from sapr_jax.training import Experiment, stages
from sapr_jax.training import workdir as layout
from sapr_jax.training.passes import recalibrate_batch_norm
from sapr_jax.training.position import Position
from sapr_jax.training.run import run_stage
from study.variants import Variant

Variables = dict[str, Any]


def build(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
  """Checks the configuration and the work directory as `training.run` does, and builds the run."""
  training.check_config(config)
  layout.check_workdir(workdir, config)
  return training.build(config)


def end_of_training(experiment: Experiment, workdir: pathlib.Path) -> tuple[Variables, Masks]:
  """Returns the variables of the dense network and the masks of a finished run, from its last checkpoint.

  Raises:
    InputError: If that is not the end of its training.
  """
  stage = stages.training_stage(experiment, training.make_proposer(experiment))
  with contextlib.closing(artifacts.Checkpointer(workdir / "checkpoints" / "train")) as checkpointer:
    state, saved = checkpointer.restore(stage.first_state)
  if Position.of_checkpoint(saved, stage.steps_per_epoch).epoch < stage.epochs:
    raise InputError(f"{workdir} holds no checkpoint of the end of its training; remove that run to do it again.")
  variables, masks = jax.device_get((state.variables, state.masks))
  return variables, masks


def generator_scores(experiment: Experiment, variables: Variables, variant: Variant) -> Scores:
  """Returns the outputs of a generator that learns on these weights in as many epochs as it does in a run."""
  proposer, mesh = variant.proposer(experiment), experiment.passes.mesh
  state, on_devices = replicate((proposer.init(), variables), mesh)
  scores: Scores | None = None
  for epoch in range(experiment.config.prune.start_epoch, experiment.config.train.epochs):
    state, scores, _ = proposer.propose(state, on_devices, epoch)
  assert scores is not None
  return scores


def train_plainly(experiment: Experiment, workdir: pathlib.Path, model: nn.Module, variables: Variables) -> Variables:
  """Trains a network in the fine-tuning phase of the configuration, without the method; resumes where it was stopped.

  Returns:
    The variables after the last epoch.

  Raises:
    InputError: If the work directory cannot be used.
    DivergedError: If training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  config = experiment.config
  layout.make_workdir(workdir, config)
  stage = stages.finetuning_stage(experiment, model, jax.device_get(variables))  # the state is donated
  with Interruption() as interruption, contextlib.closing(artifacts.Recorder(workdir)) as recorder:
    state = run_stage(stage, config, workdir / "checkpoints" / "finetune", recorder, interruption)
  return jax.device_get(state.variables)


def recalibrated(experiment: Experiment, model: nn.Module, variables: Variables) -> Variables:
  """Returns the variables with running statistics that are measured on training images."""
  batches, batch_size = experiment.config.prune.statistics_batches, experiment.config.train.batch_size
  return recalibrate_batch_norm(experiment.passes, model, variables, batches=batches, batch_size=batch_size)


def evaluate(experiment: Experiment, model: nn.Module, variables: Variables) -> dict[str, float]:
  """Returns the accuracy in [0, 1] and the mean cross-entropy on all test images."""
  return experiment.passes.evaluate(model, replicate(variables, experiment.passes.mesh))
