"""Weights from PyTorch and to PyTorch: state dicts in torchvision's names. docs/torch.md shows both ends."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from sapr_jax.artifacts.definition import fields_to_json
from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.artifacts.saved_model import named_arrays
from sapr_jax.artifacts.torch_file import read_state_dict
from sapr_jax.artifacts.torch_names import COUNTER, TENSORS, LayerNames, listed, name_layers, rename_tensors
from sapr_jax.channels import NarrowModule, abstract_image, check_module, errors_of_model
from sapr_jax.checks import check_path
from sapr_jax.errors import InputError, os_errors_in_one_line
from sapr_jax.models import CifarResNet

FORMAT = 1
_Path = tuple[str, ...]


def import_torch(
  path: str | os.PathLike[str],
  model: nn.Module,
  input_shape: Sequence[int],
  *,
  layer_names: LayerNames | None = None,
) -> dict[str, Any]:
  """Reads the weights of a network from a state dict of PyTorch.

  Files of torch.save need PyTorch: pip install 'sapr_jax[torch]'. `.safetensors` files do not. Nothing in a file is
  executed. Torchvision's names for ResNet and MobileNet-V2 are known, and the usual ones of CIFAR ResNets. The prefixes
  of DataParallel and torch.compile are taken off. A checkpoint may hold the state dict under "state_dict", "model" or
  the like. Weights of any floating dtype become float32.

  Args:
    path: File of torch.save (.pth, .pt, .th) or .safetensors.
    model: The network, of the widths and number of classes of the file; also a `NarrowModule`.
    input_shape: `[batch, height, width, channels]` of an input, to find the shapes of the variables.
    layer_names: For your own model: path of each layer ("block1/conv") -> its name in PyTorch ("features.0"), a
      mapping or a function. Only Conv, Dense and BatchNorm can be read. A state dict does not tell two things, which
      you must check: the padding (PyTorch pads evenly, "SAME" does not at stride 2), and a Dense layer after a
      flattened feature map (PyTorch flattens the channels first, so its rows are in another order).

  Returns:
    The variables, as `model.init` would give them.

  Raises:
    InputError: If the file is missing, damaged or contains more than data; if it needs PyTorch, which is not
      installed; if tensors are missing, left over or of the wrong shape (the message names them, with shapes in
      PyTorch's layout); or if the model's layers have no known names.

  Example:
    >>> import tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = sapr.models.create("resnet8", width_multiplier=0.25)
    >>> variables = jax.tree.map(jnp.ones_like, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   sapr.export_torch(f"{directory}/resnet8.safetensors", model, variables)
    ...   imported = sapr.import_torch(f"{directory}/resnet8.safetensors", model, input_shape=(1, 8, 8, 3))
    >>> jax.tree.map(jnp.shape, imported["params"]["fc"])
    {'bias': (10,), 'kernel': (16, 10)}
  """
  path, base = check_path(path), _base(model)
  variables, layers = _describe(model, input_shape)
  tensors = _name_tensors(variables, name_layers(base, list(layers), layer_names))
  state = read_state_dict(path)
  names = rename_tensors(state, tensors, other_names=layer_names is None)
  found = {name: state[original] for name, original in names.items()}
  _check_state(path, base, {name: _torch_shape(variables[tensors[name]]) for name in tensors}, found, names)
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
    input_shape: As in `import_torch`; needed only for your own model.
    layer_names: As in `import_torch`.

  Raises:
    InputError: If `path` ends otherwise, `variables` are not those of `model`, its layers have no known names, or it
      was cut where its code holds widths, which no change of single layers does in PyTorch.

  Example:
    >>> import json, pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import sapr_jax as sapr
    >>> model, variables = nn.Dense(3, name="head"), {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = pathlib.Path(directory) / "small.safetensors"
    ...   sapr.export_torch(path, model, variables, input_shape=(1, 2), layer_names={"": "classifier"})
    ...   json.loads(path.with_suffix(".json").read_text())["layers"]
    {'classifier': {'type': 'Linear', 'in_features': 2, 'out_features': 3}}
  """
  path, base = check_path(path), _base(model)
  if path.suffix != ".safetensors":
    raise InputError(f"{path} must end in .safetensors; export_torch writes no other format.")
  if cuts := sorted({path for path, *_ in _cuts(model)}, key=lambda path: (not path.endswith("/kernel"), path)):
    raise InputError(
      f"model must be cut in layers only, got one whose code holds widths that were cut ({cuts[0]} and {len(cuts) - 1}"
      " more arrays), as the code in PyTorch may too; prune without these groups, such as by select='blocks',"
      " or write it as ONNX by sapr_jax.export."
    )
  flat = {tuple(name.split("/")): array for name, array in named_arrays(variables).items()}
  if input_shape is None:
    if layer_names is not None:
      raise InputError("export_torch with layer_names needs the input_shape too, to find the model's layers.")
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
  norms = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
  state |= {f"{name}.{COUNTER}": np.zeros((), np.int64) for name in norms}
  widths = {names[layer]: description for layer, description in layers.items()}
  description = {"format": FORMAT, "class": type(base).__name__, "fields": fields_to_json(base), "layers": widths}
  with os_errors_in_one_line(path):
    if os.path.lexists(path) and not path.is_file():
      raise InputError(f"{path} exists and is not a file; name another one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(state, metadata={"format": "pt"}))
    write_json(path.with_suffix(".json"), description)


def _cuts(model: nn.Module) -> tuple[Any, ...]:
  """Returns the axes of variables that are cut in the program of the network, not in its layers."""
  return (*model.cuts, *_cuts(model.base)) if isinstance(model, NarrowModule) else ()


def _base(model: nn.Module) -> nn.Module:
  check_module(model)
  return _base(model.base) if isinstance(model, NarrowModule) else model


def _describe(
  model: nn.Module, input_shape: Sequence[int]
) -> tuple[dict[_Path, jax.ShapeDtypeStruct], dict[str, dict[str, Any]]]:
  """Returns the variables, and the layers that have some as PyTorch describes them, without computing anything."""
  inputs: dict[_Path, tuple[type[nn.Module], tuple[int, ...]]] = {}

  def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    if type(context.module) in (nn.Conv, nn.Dense, nn.BatchNorm) and context.method_name == "__call__":
      inputs[context.module.path] = type(context.module), jnp.shape([*args, *kwargs.values()][0])
    return next_fun(*args, **kwargs)

  image = abstract_image(input_shape, jnp.float32)
  with errors_of_model(f"The model and an input of shape {image.shape}"), nn.intercept_methods(note):
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  variables = traverse_util.flatten_dict(shapes)
  if others := {"/".join(key) for key in variables if key[1:-1] not in inputs or (key[0], key[-1]) not in TENSORS}:
    raise InputError(
      f"{type(_base(model)).__name__} has {listed(sorted(others))} outside Conv, Dense and BatchNorm; only these have a"
      " known counterpart in PyTorch."
    )
  owners = {key[1:-1] for key in variables}
  return variables, {
    "/".join(path): _torch_layer(kind, shape, variables.get(("params", *path, "kernel")))
    for path, (kind, shape) in inputs.items()  # in the order of the calls
    if path in owners
  }


def _torch_layer(
  kind: type[nn.Module], shape: tuple[int, ...], kernel: jax.ShapeDtypeStruct | None
) -> dict[str, str | int]:
  axes, inputs = len(shape) - 2, shape[-1]
  if kernel is None:
    return {"type": f"BatchNorm{max(axes, 1)}d", "num_features": inputs}
  reads, outputs = kernel.shape[-2:]  # a kernel reads the channels of one group
  if kind is nn.Dense:
    return {"type": "Linear", "in_features": inputs, "out_features": outputs}
  return {"type": f"Conv{axes}d", "in_channels": inputs, "out_channels": outputs, "groups": inputs // reads}


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


def _check_state(
  path: pathlib.Path,
  base: nn.Module,
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, np.ndarray],
  names: Mapping[str, str],
) -> None:
  """Checks the tensors `found` against the shapes `expected`; `names` has their names in the file."""
  shortcuts = [original for name, original in names.items() if ".downsample." in name]
  if isinstance(base, CifarResNet) and shortcuts:
    raise InputError(
      f"{path} is of another network: its shortcuts have parameters ({listed(shortcuts, 3)}), those of CifarResNet have"
      " none (option A); expected weights of a CIFAR ResNet with option A."
    )
  both = [name for name in expected if name in found]
  problems = {
    "missing": [name for name in expected if name not in found],
    "left over": sorted(names[name] for name in found if name not in expected),
    "of the wrong shape": [
      f"{name} {list(found[name].shape)} instead of {list(expected[name])}"
      for name in both
      if found[name].shape != expected[name]
    ],
    "not of floats": [name for name in both if not jnp.issubdtype(found[name].dtype, jnp.floating)],
  }
  if any(problems.values()):
    text = "; ".join(f"{problem} {listed(items)}" for problem, items in problems.items() if items)
    raise InputError(
      f"{path} does not fit {type(base).__name__}: {text}. Expected the state dict of the same architecture, widths and"
      " number of classes."
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
