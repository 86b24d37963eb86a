"""Names of layers and tensors in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import flax.linen as nn

from sapr_jax.checks import shown
from sapr_jax.errors import InputError
from sapr_jax.models import TORCH_NAMES

LayerNames = Callable[[str], str] | Mapping[str, str]
"""Path of a Flax layer, "block1/conv" -> name of the torch layer, "features.3"."""

TENSORS = {
  ("params", "kernel"): "weight",
  ("params", "scale"): "weight",
  ("params", "bias"): "bias",
  ("batch_stats", "mean"): "running_mean",
  ("batch_stats", "var"): "running_var",
}
"""(collection, variable) of a Flax layer -> tensor of a torch layer."""

COUNTER = "num_batches_tracked"
"""A tensor of PyTorch's batch normalization. It counts training steps; our networks have no use for it."""

_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_CLASSIFIERS = ("fc", "linear", "classifier", "classifier.1")


def name_layers(base: nn.Module, paths: Collection[str], layer_names: LayerNames | None = None) -> dict[str, str]:
  """Returns path -> torch name of each layer of a dense network.

  Raises `InputError` if a layer has no name, two have the same, or `layer_names` is needed or names an unknown layer.
  """
  if layer_names is None:
    if type(base) not in TORCH_NAMES:
      known = ", ".join(cls.__name__ for cls in TORCH_NAMES)
      raise InputError(
        f"{type(base).__name__} is not a model of this package ({known}), so its"
        " layers have no known names in PyTorch; give them: layer_names={'block1/conv': 'features.0', ...}."
      )
    names = TORCH_NAMES[type(base)](paths)
  elif callable(layer_names):
    names = {path: layer_names(path) for path in paths}
  elif not isinstance(layer_names, Mapping):
    raise InputError(f"layer_names must be a mapping or a function of paths, got {shown(layer_names)}.")
  else:
    names = {path: layer_names[path] for path in paths if path in layer_names}
    if unknown := sorted(map(str, set(layer_names) - set(paths))):
      raise InputError(f"layer_names names {listed(unknown)}; the layers are {listed(sorted(paths))}.")
  if unnamed := [path for path in paths if not isinstance(names.get(path), str)]:
    raise InputError(f"layer_names gives no name for {listed(unnamed)}; expected the name of a torch layer for each.")
  if twice := sorted({name for name in names.values() if list(names.values()).count(name) > 1}):
    raise InputError(f"layer_names gives several layers the name {listed(twice)}; expected a different one for each.")
  return {path: names[path] for path in paths}


def rename_tensors(found: Collection[str], wanted: Collection[str], other_names: bool) -> dict[str, str]:
  """Returns the tensors of a file by the names that `name_layers` gives: wanted name -> name in the file.

  Prefixes that wrappers of modules add are taken off. The counters of batch normalization are left out. `other_names`
  says whether the classifier and the shortcuts may have the other names in use than torchvision's.
  """
  names = {name: name for name in found if name.rpartition(".")[2] != COUNTER}
  while prefix := next((p for p in _PREFIXES if _all_start(names, p) and not _all_start(wanted, p)), None):
    names = {name.removeprefix(prefix): original for name, original in names.items()}
  if not other_names:
    return names
  (classifier,) = {name.removesuffix(".weight") for name in wanted} & set(_CLASSIFIERS)
  other = next((c for c in (classifier, *_CLASSIFIERS) if f"{c}.weight" in names), classifier)
  renamed = {}
  for name, original in names.items():
    layer, _, tensor = name.rpartition(".")
    name = f"{classifier}.{tensor}" if layer == other else name.replace(".shortcut.", ".downsample.")
    renamed[name if name not in renamed else original] = original
  return renamed


def _all_start(names: Collection[str], prefix: str) -> bool:
  return bool(names) and all(name.startswith(prefix) for name in names)


def listed(items: Collection[str], most: int = 8) -> str:
  """Returns the first items and the number of the others, for a message of one line."""
  texts = [item if item.isprintable() and len(item) < 200 else ascii(item)[:200] for item in list(items)[:most]]
  return ", ".join(texts) + (f" and {len(items) - most} more" if len(items) > most else "")
