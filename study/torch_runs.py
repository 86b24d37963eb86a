"""Runs of the CIFAR-10 study in PyTorch: Torch-Pruning by group norm or Taylor, at once or after its sparse learning.

The steps are those of its own recipe for ResNet-56 (`reproduce/` in its repository): sparse learning by
`GroupNormPruner.regularize` in place of weight decay, then channels of all layers cut in 400 small steps until the MACs
are met, then fine-tuning. First weights, images, augmentation, batches, learning rates and epochs are those of our own
runs; sparse learning takes the epochs in which our own regularization is on. Needs torch and torch-pruning.

References:
  Fang et al., DepGraph: towards any structural pruning, CVPR 2023.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn

from benchmarks.measuring import versions
from benchmarks.torch_networks import CifarResNet, MobileNetV2, count_macs
from sapr_jax import data, models
from sapr_jax.artifacts import export_torch
from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.artifacts.records import FILE as RECORDS
from sapr_jax.channels import trace_channels
from sapr_jax.errors import DivergedError, InputError
from sapr_jax.runtime import Interruption, say
from sapr_jax.training import check_config, workdir as layout
from sapr_jax.training.experiment import first_network
from sapr_jax.training.feed import data_spec
from sapr_jax.training.optimizers import MIN_NDIM_OF_DECAYED, learning_rate_schedule
from sapr_jax.training.passes import Purpose
from study.ours import budget_macs
from study.rows import Job

TAYLOR = "taylor"
"""`Row.choice` of the run whose channels are ranked by the first-order change of the loss."""

_CHECKPOINT = "torch.pt"
_INSIDE = re.compile(r"layer\d\.\d+\.conv1|features\.(?!1\.)\d+\.conv\.[01]\.0")
"""Names of the convolutions that make, or take along, channels inside a block, of a CIFAR ResNet or MobileNet-V2."""
_STEPS_OF_PRUNING = 400  # the recipe's
_RECIPE_REG = 5e-4  # of its sparse learning, for ResNet-56
_RECIPE_RATES = 390 * (60 * 0.01 + 20 * 0.001 + 20 * 0.0001)  # the sum of its learning rates over the steps


def run_pruner(job: Job) -> None:
  """Trains, prunes and fine-tunes; resumes after the last finished epoch.

  `job.row.choice` is the strength of the sparse learning, 0 for none: see `scaled_reg`. `TAYLOR` has none, and another
  importance.

  Raises:
    InputError: If the configuration or the work directory cannot be used.
    DivergedError: If training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  check_config(job.config)
  layout.check_workdir(job.workdir, job.config)
  images = Images(job.config)
  torch.backends.cudnn.benchmark = True  # chooses the fastest convolutions, as no shape changes
  layout.make_workdir(job.workdir, job.config)
  with Interruption() as interruption:
    run = _Run(job, images, interruption)
    run.restore()
    run.train()
    run.prune()
    run.finetune()
    used = {name: version for name, version in versions().items() if name in ("torch", "torch-pruning")}
    device = torch.cuda.get_device_name() if images.device.type == "cuda" else "cpu"
    write_json(job.workdir / layout.SUMMARY, {**run.summary, "run": {"versions": used, "device": device}})


class Images:
  """The images of our own run with this configuration, on the device, and its batches."""

  def __init__(self, config: Any):
    dataset = data.load_dataset(data_spec(config))
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.shape, self.num_classes = dataset.image_shape, len(dataset.class_names)
    self._config, measured, fields = config, dataset.channel_statistics(), config.data
    self._mean, self._std = (
      torch.tensor(own if given is None else given, dtype=torch.float32, device=self.device)
      for own, given in zip(measured, (fields.mean, fields.std), strict=True)
    )
    self._splits = {
      name: (torch.tensor(split.images, device=self.device), torch.tensor(split.labels, device=self.device).long())
      for name, split in (("train", dataset.train), ("test", dataset.test))
    }

  def steps_per_epoch(self, phase: Any) -> int:
    """Batches in an epoch of a phase."""
    return len(self._splits["train"][1]) // phase.batch_size

  def training(self, phase: Any, epoch: int, purpose: int) -> Any:
    """Yields (inputs, labels) of an epoch, augmented, in the order of our own run."""
    images, labels = self._splits["train"]
    seed = self._config.seed
    generator = torch.Generator().manual_seed((seed * 10 + purpose) * 10_000 + epoch)
    for indices in data.epoch_batches(len(labels), phase.batch_size, seed=seed, epoch=epoch, purpose=purpose):
      chosen = torch.from_numpy(indices).long().to(self.device)
      batch = augment(images[chosen], generator, padding=self._config.data.crop_padding, flip=self._config.data.flip)
      yield self._normalized(batch), labels[chosen]

  def evaluation(self) -> Any:
    """Yields (inputs, labels) of all test images."""
    size = self._config.eval_batch_size
    for images, labels in zip(*(tensor.split(size) for tensor in self._splits["test"]), strict=True):
      yield self._normalized(images), labels

  def _normalized(self, images: torch.Tensor) -> torch.Tensor:
    return ((images.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()


def augment(images: torch.Tensor, generator: torch.Generator, *, padding: int, flip: bool) -> torch.Tensor:
  """Crops uint8 images `[N, H, W, C]` at random after padding them with zeros, and mirrors half of them."""
  count, height, width, _ = images.shape
  if padding:
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    images = padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
  if flip:
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
  return images


def make_network(ours: Any, variables: Any) -> nn.Module:
  """Returns a network of this package in PyTorch, with the same weights.

  Raises:
    InputError: If it is neither a CIFAR ResNet nor a MobileNet-V2.
  """
  width = ours.width_multiplier
  if isinstance(ours, models.CifarResNet):
    widths = tuple(max(1, round(16 * 2**stage * width)) for stage in range(3))
    model: nn.Module = CifarResNet(ours.depth, ours.num_classes, widths)
  elif isinstance(ours, models.MobileNetV2):
    model = MobileNetV2(ours.num_classes, width, small_images=ours.small_images)
    model.classifier[0] = nn.Dropout(ours.dropout)
  else:
    raise InputError(f"a {type(ours).__name__} has no counterpart in PyTorch here; leave out the rows torch_pruning*.")
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "weights.safetensors"
    export_torch(file, ours, variables)
    state = safetensors.torch.load_file(file)
  linear = isinstance(model, CifarResNet)  # which calls its last layer so
  model.load_state_dict({name.replace("fc.", "linear.") if linear else name: state[name] for name in state})
  return model


def scaled_reg(strength: float, sum_of_rates: float) -> float:
  """Returns the coefficient with which sparse learning shrinks weights as much as `strength` times the recipe's does.

  It takes off a weight a part that is proportional to the coefficient times the sum of the learning rates.
  """
  return strength * _RECIPE_REG * _RECIPE_RATES / sum_of_rates if strength else 0.0


def make_pruner(model: nn.Module, inputs: torch.Tensor, reg: float, *, taylor: bool = False) -> Any:
  """Returns Torch-Pruning's pruner as its recipe sets it up; reg 0: without sparse learning; its norms, or Taylor."""
  normalizer = "max" if reg > 0 else "mean"
  importance = (
    torch_pruning.importance.GroupTaylorImportance(normalizer=normalizer)
    if taylor
    else torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
  )
  ignored: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
  # The shortcuts of a CIFAR ResNet pad with a fixed number of channels, so that the residual streams cannot be cut; nor
  # do we in any network, and the choice is compared among the same channels.
  ignored += [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not _is_inside(name)]
  return torch_pruning.pruner.GroupNormPruner(
    model,
    inputs,
    importance=importance,
    reg=reg,
    global_pruning=True,
    pruning_ratio=1.0,
    iterative_steps=_STEPS_OF_PRUNING,
    ignored_layers=ignored,
  )


def _is_inside(name: str) -> bool:
  """Says whether the outputs of a convolution lie inside a block."""
  return _INSIDE.fullmatch(name) is not None


def cut(pruner: Any, model: nn.Module, inputs: torch.Tensor, macs: float) -> None:
  """Cuts channels in small steps until no more than so many MACs are left.

  Raises:
    InputError: If nothing is left to cut before.
  """
  while count_macs(model, inputs.shape[1:]) > macs:
    if pruner.current_step == _STEPS_OF_PRUNING:
      raise InputError(f"Torch-Pruning cannot reach {macs:,.0f} MACs; raise prune.p.")
    pruner.step()


def decay_groups(model: nn.Module, phase: Any) -> list[dict[str, Any]]:
  """Returns the parameters that weight decay shrinks, and those that it does not, as our own optimizer has them."""
  ndim = MIN_NDIM_OF_DECAYED[phase.weight_decay_of]
  decayed = [w for w in model.parameters() if w.ndim >= ndim]
  rest = [w for w in model.parameters() if w.ndim < ndim]
  groups = [{"params": decayed, "weight_decay": phase.weight_decay}, {"params": rest, "weight_decay": 0.0}]
  return [group for group in groups if group["params"]]


@dataclasses.dataclass
class _Run:
  """A run in progress."""

  job: Job
  images: Images
  interruption: Interruption

  def __post_init__(self) -> None:
    config, images = self.job.config, self.images
    self.history: list[Any] = []
    self.records: list[dict[str, Any]] = []
    self.summary: dict[str, Any] = {}
    torch.manual_seed(config.seed)  # of dropout
    self.ours, variables = first_network(config, images.num_classes, (1, *images.shape))
    self.model = make_network(self.ours, variables).to(images.device)
    height, width, channels = images.shape
    self.inputs = torch.zeros(1, channels, height, width, device=images.device)
    self.rates = {phase: self._rates(config[phase]) for phase in ("train", "finetune")}
    sparse = self.rates["train"][config.prune.start_epoch * images.steps_per_epoch(config.train) :]
    self.taylor = self.job.row.choice == TAYLOR
    self.strength = 0.0 if self.taylor else self.job.row.choice
    reg = scaled_reg(self.strength, float(sparse.sum()))
    self.pruner = make_pruner(self.model, self.inputs, reg, taylor=self.taylor)
    self.optimizer = self._make_optimizer(config.train)

  def _rates(self, phase: Any) -> np.ndarray:
    """Returns the learning rate of each step of a phase."""
    steps = self.images.steps_per_epoch(phase)
    return np.asarray(jax.vmap(learning_rate_schedule(phase, steps))(jnp.arange(phase.epochs * steps)))

  def _make_optimizer(self, phase: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
      decay_groups(self.model, phase), phase.learning_rate, phase.momentum, nesterov=phase.nesterov
    )

  def restore(self) -> None:
    """Restores what an earlier call saved."""
    file = self.job.workdir / _CHECKPOINT
    if not file.is_file():
      return
    saved = torch.load(file, map_location=self.images.device, weights_only=True)
    self.records, self.history, self.summary = saved["records"], saved["history"], saved["summary"]
    if self.history:
      self.pruner.DG.load_pruning_history(self.history)
      self.optimizer = self._make_optimizer(self.job.config.finetune)
    self.model.load_state_dict(saved["model"])
    self.optimizer.load_state_dict(saved["optimizer"])
    say(f"{self.job}: going on after epoch {len(self.records)}")

  def _save(self) -> None:
    buffer = io.BytesIO()
    state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
    torch.save({**state, "records": self.records, "history": self.history, "summary": self.summary}, buffer)
    write_atomically(self.job.workdir / _CHECKPOINT, buffer.getvalue())
    write_atomically(self.job.workdir / RECORDS, "".join(json.dumps(record) + "\n" for record in self.records))

  def train(self) -> None:
    """Trains the dense network, from E_start on with sparse learning if there is a strength."""
    phase = self.job.config.train
    for epoch in range(len(self.records), phase.epochs):
      sparse = self.strength > 0 and epoch >= self.job.config.prune.start_epoch
      self._epoch("train", epoch, Purpose.TRAIN, sparse=sparse)

  def prune(self) -> None:
    """Cuts channels until the MACs are within the budget of our own run, unless an earlier call did."""
    if self.summary:
      return
    dense = {"macs": self._macs(), "accuracy": self._accuracy()}
    target = self._target_macs()
    if self.taylor:
      self._sum_gradients()
    cut(self.pruner, self.model, self.inputs, target)
    self.history = self.pruner.DG.pruning_history()
    small = {"macs": self._macs()}
    self.summary = {"dense": dense, "subnetwork": {**small, "accuracy": self._accuracy()}, "pruned": small}
    self.optimizer = self._make_optimizer(self.job.config.finetune)
    self._save()

  def _sum_gradients(self) -> None:
    """Leaves the gradient of one pass over the training images, which the pruner cuts along with the parameters."""
    self.model.eval()
    self.model.zero_grad()
    for inputs, labels in self.images.training(self.job.config.finetune, 0, Purpose.IMPORTANCE):
      F.cross_entropy(self.model(inputs), labels).backward()

  def finetune(self) -> None:
    """Trains the pruned network."""
    config = self.job.config
    for epoch in range(len(self.records) - config.train.epochs, config.finetune.epochs):
      self._epoch("finetune", epoch, Purpose.FINETUNE)
    self.summary["pruned"] = {**self.summary["pruned"], "accuracy": self._accuracy()}

  def _macs(self) -> int:
    return count_macs(self.model, self.inputs.shape[1:])

  def _target_macs(self) -> float:
    settings, shape = self.job.config.prune, (1, *self.images.shape)
    variables = jax.eval_shape(self.ours.init, jax.random.key(0), jnp.zeros(shape))
    return budget_macs(trace_channels(self.ours, variables, shape, select=settings.select), settings.p)

  def _epoch(self, name: str, epoch: int, purpose: int, *, sparse: bool = False) -> None:
    """Trains for one epoch, evaluates, records, saves."""
    if self.interruption.requested():
      self.interruption.stop()  # the epoch before is saved
    phase, clock, losses = self.job.config[name], time.monotonic(), []
    rates = self.rates[name].reshape(phase.epochs, -1)[epoch]
    self.model.train()
    for rate, (inputs, labels) in zip(rates, self.images.training(phase, epoch, purpose), strict=True):
      for group in self.optimizer.param_groups:
        group["lr"] = float(rate)
        if sparse:
          group["weight_decay"] = 0.0  # for which the recipe's sparse learning stands in
      self.optimizer.zero_grad()
      loss = F.cross_entropy(self.model(inputs), labels)
      loss.backward()
      if sparse:
        self.pruner.regularize(self.model)
      self.optimizer.step()
      losses.append(loss.detach())
    mean_loss, seconds = float(torch.stack(losses).mean()), time.monotonic() - clock
    if not np.isfinite(mean_loss):
      raise DivergedError(f"{self.job}: train_loss is {mean_loss} in epoch {epoch + 1} of {name}: training diverged.")
    accuracy = self._accuracy()
    record = {"stage": name, "epoch": epoch + 1, "step": len(self.records) + 1, "learning_rate": float(rates[0])}
    record |= {"train_loss": mean_loss, "test_accuracy": accuracy, "weight_seconds": seconds}
    self.records.append(record | {"evaluation_seconds": time.monotonic() - clock - seconds})
    self._save()
    say(f"{name} {epoch + 1}/{phase.epochs}: loss {mean_loss:.4f}, test {accuracy:.2%}, {seconds:.1f} s")

  def _accuracy(self) -> float:
    self.model.eval()
    with torch.no_grad():
      correct = [(self.model(inputs).argmax(1) == labels).float() for inputs, labels in self.images.evaluation()]
    return float(torch.cat(correct).mean())
