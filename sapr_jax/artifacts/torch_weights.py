"""Weights from PyTorch and to PyTorch: state dicts in torchvision's names. docs/torch.md shows both ends."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.artifacts.saved_model import fields_to_json
from sapr_jax.artifacts.torch_file import read_torch_file
from sapr_jax.artifacts.torch_names import COUNTER, TENSORS, LayerNames, listed, name_layers, rename_tensors
from sapr_jax.channels import NarrowModule
from sapr_jax.errors import InputError
from sapr_jax.models import CifarResNet

FORMAT = 1
_TORCH_SUFFIXES = (".pth", ".pt", ".th")
_SAFETENSORS_DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "BOOL": np.bool_,
  **{f"{letter}{8 * size}": np.dtype(f"{letter.lower()}{size}") for letter in "IU" for size in (1, 2, 4, 8)},
}

_Path = tuple[str, ...]


def import_torch(
  path: str | os.PathLike[str],
  model: nn.Module,
  input_shape: Sequence[int],
  *,
  layer_names: LayerNames | None = None,
) -> dict[str, Any]:
  """Reads the weights of a network from a state dict of PyTorch.

  Nothing in the file is executed, and PyTorch is not needed. Known are torchvision's names for ResNet and MobileNet-V2
  and the usual ones of CIFAR ResNets, with or without the prefixes of DataParallel and torch.compile, also where a
  checkpoint has the state dict under "state_dict", "model" or the like. Weights of any floating dtype become float32.

  Args:
    path: File of torch.save (.pth, .pt, .th) or .safetensors.
    model: The network, of the widths and number of classes of the file; also a `NarrowModule`.
    input_shape: `[batch, height, width, channels]` of an input, to find the shapes of the variables.
    layer_names: For a model of one's own: path of each layer ("block1/conv") -> its name in PyTorch ("features.0"), a
      mapping or a function. Only Conv, Dense and BatchNorm can be read. Two things a state dict does not tell and are
      yours to see to: the padding (PyTorch pads evenly, "SAME" does not at stride 2), and a Dense layer after a
      flattened feature map (PyTorch flattens the channels first, so its rows are in another order).

  Returns:
    The variables, as `model.init` would give them.

  Raises:
    InputError: If the file is missing, damaged or contains more than data, tensors are missing, left over or of the
      wrong shape (the message names them, with shapes in PyTorch's layout), or the model's layers have no known names.

  Example:
    >>> model = sapr.models.create("resnet50")
    >>> variables = sapr.import_torch("resnet50-0676ba61.pth", model, (1, 224, 224, 3))
  """
  path, base = pathlib.Path(path), _base(model)
  variables, layers = _describe(model, input_shape)
  tensors = _name_tensors(variables, name_layers(base, list(layers), layer_names))
  state = _read(path)
  names = rename_tensors(state, tensors, other_names=layer_names is None)
  found = {name: state[original] for name, original in names.items()}
  _check_option_a(path, base, names)
  _check_state(path, base, tensors, variables, found, names)
  flat = {}
  for name, variable in tensors.items():
    axes = np.argsort(_torch_axes(variables[variable].ndim))
    flat[variable] = jnp.asarray(found[name].transpose(axes).astype(np.float32, order="C"))
  return traverse_util.unflatten_dict({variable: flat[variable] for variable in variables})


def export_torch(
  path: str | os.PathLike[str],
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  input_shape: Sequence[int] | None = None,
  layer_names: LayerNames | None = None,
) -> None:
  """Writes a network, dense or pruned, as a state dict for PyTorch, in float32.

  The names are torchvision's; those of a CIFAR ResNet too (`fc`, which some repositories call `linear`). Beside
  `NAME.safetensors` it writes `NAME.json`: class and fields of the network, and the channels of each torch layer, from
  which docs/torch.md builds the narrow network in PyTorch.

  Args:
    path: File to write, ending in .safetensors.
    model: The network, or the `NarrowModule` that `prune` returned.
    variables: Its variables.
    input_shape: As in `import_torch`; needed only for a model of one's own.
    layer_names: As in `import_torch`.

  Raises:
    InputError: If `path` ends otherwise, `variables` are not those of `model`, or its layers have no known names.

  Example:
    >>> small_model, small_variables = sapr.prune(model, variables, graph, masks)
    >>> sapr.export_torch("small.safetensors", small_model, small_variables)
  """
  path, base = pathlib.Path(path), _base(model)
  if path.suffix != ".safetensors":
    raise InputError(f"{path} does not end in .safetensors; export_torch writes no other format.")
  flat = traverse_util.flatten_dict(dict(variables))
  if input_shape is None:
    if layer_names is not None:
      raise InputError("export_torch with layer_names wants the input_shape too, to find the model's layers.")
    stem = flat.get(("params", "conv", "kernel"))
    input_shape = (1, 32, 32, 3 if stem is None else jnp.shape(stem)[-2])
  shapes, layers = _describe(model, input_shape)
  names = name_layers(base, list(layers), layer_names)
  tensors = _name_tensors(shapes, names)
  _check_variables(base, shapes, flat)
  state = {}
  for name, variable in tensors.items():
    array = np.asarray(flat[variable]).astype(np.float32)
    state[name] = np.ascontiguousarray(array.transpose(_torch_axes(array.ndim)))
  state |= {f"{names[p]}.{COUNTER}": np.zeros((), np.int64) for p, layer in layers.items() if layer.kind == "BatchNorm"}
  widths = {names[layer]: description.widths() for layer, description in layers.items()}
  write_atomically(path, safetensors.numpy.save(state, metadata={"format": "pt"}))
  write_json(
    path.with_suffix(".json"),
    {"format": FORMAT, "class": type(base).__name__, "fields": fields_to_json(base), "layers": widths},
  )


# ----------------------------------------------------------------------------------------------------------------------
# The network's layers
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layer:
  """A layer as PyTorch describes it."""

  kind: str
  axes: int  # spatial ones of its input
  inputs: int
  outputs: int
  groups: int

  def widths(self) -> dict[str, Any]:
    if self.kind == "Conv":
      sizes = {"in_channels": self.inputs, "out_channels": self.outputs, "groups": self.groups}
      return {"type": f"Conv{self.axes}d", **sizes}
    if self.kind == "Dense":
      return {"type": "Linear", "in_features": self.inputs, "out_features": self.outputs}
    return {"type": f"BatchNorm{max(self.axes, 1)}d", "num_features": self.inputs}


def _base(model: nn.Module) -> nn.Module:
  return _base(model.base) if isinstance(model, NarrowModule) else model


def _describe(
  model: nn.Module, input_shape: Sequence[int]
) -> tuple[dict[_Path, jax.ShapeDtypeStruct], dict[str, _Layer]]:
  """Returns the variables, and the layers that have some, without computing anything."""
  inputs: dict[_Path, tuple[type[nn.Module], tuple[int, ...]]] = {}

  def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    if type(context.module) in (nn.Conv, nn.Dense, nn.BatchNorm) and context.method_name == "__call__":
      inputs[context.module.path] = type(context.module), jnp.shape([*args, *kwargs.values()][0])
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32))
  variables = traverse_util.flatten_dict(shapes)
  others = sorted({"/".join(key) for key in variables if key[1:-1] not in inputs or (key[0], key[-1]) not in TENSORS})
  if others:
    raise InputError(
      f"{type(_base(model)).__name__} has {listed(others)}, of no Conv, Dense or BatchNorm; only these have a known"
      " counterpart in PyTorch."
    )
  layers, owners = {}, {key[1:-1] for key in variables}
  for path, (kind, shape) in inputs.items():  # in the order of the calls
    if path not in owners:
      continue
    # A kernel reads the channels of one group.
    kernel = variables.get(("params", *path, "kernel"))
    reads, outputs = (shape[-1], shape[-1]) if kernel is None else kernel.shape[-2:]
    layers["/".join(path)] = _Layer(kind.__name__, len(shape) - 2, shape[-1], outputs, shape[-1] // reads)
  return variables, layers


def _name_tensors(variables: Mapping[_Path, jax.ShapeDtypeStruct], names: Mapping[str, str]) -> dict[str, _Path]:
  """Returns torch tensor -> variable, in the order of a state dict."""
  tensors = {}
  for layer, name in names.items():
    for (collection, variable), tensor in TENSORS.items():
      path = (collection, *(layer.split("/") if layer else ()), variable)
      if path in variables:
        tensors[f"{name}.{tensor}"] = path
  return tensors


def _torch_axes(ndim: int) -> tuple[int, ...]:
  """Returns the axes of a variable in PyTorch's order: a kernel `[*window, in, out]` is `[out, in, *window]` there."""
  return (ndim - 1, ndim - 2, *range(ndim - 2)) if ndim > 1 else tuple(range(ndim))


def _torch_shape(variable: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  return tuple(variable.shape[axis] for axis in _torch_axes(variable.ndim))


# ----------------------------------------------------------------------------------------------------------------------
# Reading and checking
# ----------------------------------------------------------------------------------------------------------------------


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  if path.suffix in _TORCH_SUFFIXES:
    return read_torch_file(path)
  if path.suffix != ".safetensors":
    wrong = "has an unknown ending" if path.exists() else "is missing"
    raise InputError(
      f"{path} {wrong}; expected .safetensors or {', '.join(_TORCH_SUFFIXES)}, or the directory of a saved model."
    )
  try:
    entries = safetensors.deserialize(path.read_bytes())
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}); give a .safetensors or .pth file.") from None
  except safetensors.SafetensorError as error:
    raise InputError(f"{path} is no whole safetensors file ({error}); copy or save it again.") from None
  state = {}
  for name, entry in entries:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
      raise InputError(f"{path} has {name} of dtype {entry['dtype']}; expected floats of 16, 32 or 64 bits.")
    dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    state[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
  return state


def _check_option_a(path: pathlib.Path, base: nn.Module, names: Mapping[str, str]) -> None:
  shortcuts = [original for name, original in names.items() if ".downsample." in name]
  if isinstance(base, CifarResNet) and shortcuts:
    raise InputError(
      f"{path} is of another network: its shortcuts have parameters ({listed(shortcuts, 3)}), those of CifarResNet have"
      " none (option A); expected weights of a CIFAR ResNet with option A."
    )


def _check_state(
  path: pathlib.Path,
  base: nn.Module,
  tensors: Mapping[str, _Path],
  variables: Mapping[_Path, jax.ShapeDtypeStruct],
  found: Mapping[str, np.ndarray],
  names: Mapping[str, str],
) -> None:
  problems = []
  if missing := [name for name in tensors if name not in found]:
    problems.append(f"missing {listed(missing)}")
  if left_over := sorted(names[name] for name in found if name not in tensors):
    problems.append(f"left over {listed(left_over)}")
  expected = {name: _torch_shape(variables[tensors[name]]) for name in tensors if name in found}
  wrong = [
    f"{name} {list(found[name].shape)} instead of {list(shape)}"
    for name, shape in expected.items()
    if found[name].shape != shape
  ]
  if wrong:
    problems.append(f"of the wrong shape {listed(wrong)}")
  if no_floats := [
    f"{n} ({found[n].dtype.name})" for n in expected if not jnp.issubdtype(found[n].dtype, jnp.floating)
  ]:
    problems.append(f"not of floats {listed(no_floats)}")
  if problems:
    raise InputError(
      f"{path} does not fit {type(base).__name__}: {'; '.join(problems)}. Expected the state dict of the same"
      " architecture, widths and number of classes."
    )


def _check_variables(base: nn.Module, shapes: Mapping[_Path, jax.ShapeDtypeStruct], flat: Mapping[_Path, Any]) -> None:
  for key in sorted({*shapes, *flat}):
    expected = shapes[key].shape if key in shapes else None
    found = jnp.shape(flat[key]) if key in flat else None
    if expected != found:
      raise InputError(
        f"variables has {'/'.join(key)} of shape {found}; {type(base).__name__} has {expected}. Expected the variables"
        " of this model."
      )


__all__ = ["export_torch", "import_torch"]
