"""Parts of a training run that the study uses by themselves, without the run around them."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from sapr_jax import artifacts
from sapr_jax.channels import Masks
from sapr_jax.errors import InputError
from sapr_jax.method import Scores, split_by_group
from sapr_jax.training import Variant, epochs, loop, steps
from sapr_jax.training import setup as setup_lib
from sapr_jax.training import workdir as layout
from sapr_jax.training.checks import check_config
from sapr_jax.training.devices import replicate
from sapr_jax.training.interruption import Interruption
from sapr_jax.training.setup import Setup

Variables = dict[str, Any]


def build(config: ConfigDict, workdir: pathlib.Path) -> Setup:
  """Checks the configuration and the work directory as `training.run` does, and builds the run."""
  check_config(config)
  layout.check_workdir(workdir, config)
  return setup_lib.build(config)


def end_of_training(setup: Setup, workdir: pathlib.Path) -> tuple[Variables, Masks]:
  """Returns the variables of the dense network and the masks of a finished run, from its last checkpoint.

  Raises:
    InputError: If that is not the end of its training.
  """
  with contextlib.closing(artifacts.Checkpointer(workdir / "checkpoints" / "train")) as checkpointer:
    state, position = loop.restore(setup, loop.pruning_stage(setup), checkpointer)
  if position.epoch < setup.config.train.epochs:
    raise InputError(f"{workdir} holds no checkpoint of the end of its training; remove that run to do it again.")
  variables, masks = jax.device_get((state["network"].variables, state["masks"]))
  return variables, masks


def generator_scores(setup: Setup, variables: Variables, variant: Variant) -> Scores:
  """Returns the outputs of a generator that learns on these weights in as many epochs as it does in a run."""
  stage = loop.pruning_stage(setup, variant)
  assert stage.generator_steps is not None
  generator, on_devices = stage.state["generator"], replicate(variables, setup.mesh)
  for epoch in range(setup.config.prune.start_epoch, setup.config.train.epochs):
    generator, _ = epochs.train_generator(setup, stage.generator_steps, generator, on_devices, epoch=epoch)
  return split_by_group(jax.device_get(setup.generator_outputs(generator.variables)), setup.graph)


def train_plainly(setup: Setup, workdir: pathlib.Path, model: nn.Module, variables: Variables) -> Variables:
  """Trains a network in the fine-tuning phase of the configuration, without the method; resumes where it was stopped.

  Returns:
    The variables after the last epoch.

  Raises:
    InputError: If the work directory cannot be used, or training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  layout.make_workdir(workdir, setup.config)
  folder, keep = workdir / "checkpoints" / "finetune", setup.config.checkpoint.keep
  with (
    Interruption() as interruption,
    contextlib.closing(artifacts.Recorder(workdir)) as recorder,
    contextlib.closing(artifacts.Checkpointer(folder, keep)) as checkpointer,
  ):
    stage = loop.finetuning_stage(setup, model, jax.device_get(variables))  # the state is donated
    state, position = loop.restore(setup, stage, checkpointer)
    state = loop.train(setup, stage, state, position, checkpointer, recorder, interruption)
  return jax.device_get(state["network"].variables)


def recalibrated(setup: Setup, model: nn.Module, variables: Variables) -> Variables:
  """Returns the variables with running statistics that are measured on training images."""
  batches = setup.config.prune.statistics_batches
  return epochs.renew_statistics(setup, model, variables, batches=batches, between_calls=lambda: None)


def evaluate(setup: Setup, model: nn.Module, variables: Variables) -> dict[str, float]:
  """Returns the accuracy in [0, 1] and the mean cross-entropy on all test images."""
  evaluation = setup.mapped(steps.evaluation_step(model, setup.feed.preprocessing))
  return epochs.evaluate(setup, evaluation, replicate(variables, setup.mesh))
