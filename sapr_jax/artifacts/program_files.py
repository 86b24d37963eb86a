"""Programs to serve a model without this package: StableHLO and ONNX. docs/export.md shows the other end."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sapr_jax.artifacts.definition import definition_of
from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.artifacts.onnx_graph import OPSET, onnx_model
from sapr_jax.artifacts.saved_model import named_arrays
from sapr_jax.artifacts.torch_weights import export_torch
from sapr_jax.channels import NarrowModule, abstract_image, check_module, errors_of_model, evaluate, is_nnx, network_of
from sapr_jax.checks import check_dtype, check_function, check_integer, check_path, shown
from sapr_jax.errors import InputError, one_line, os_errors_in_one_line
from sapr_jax.models import has_fast_layers, with_fast_layers
from sapr_jax.version import __version__

if TYPE_CHECKING:
  from flax import nnx  # takes a while to import

FORMAT = 1
SUFFIXES = (".stablehlo", ".onnx", ".safetensors")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")


def export(
  path: str | os.PathLike[str],
  model: nn.Module | nnx.Module,
  variables: Any = None,
  input_shape: Any = None,
  *,
  batch: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
  dtype: Any = None,
  preprocess: Callable[[jax.Array], jax.Array] | None = None,
  input_dtype: Any = None,
  apply_kwargs: Mapping[str, Any] | None = None,
  class_names: Sequence[str] | None = None,
) -> None:
  """Writes a model, dense or pruned, as one file that runs without this package and without Flax.

  The suffix of `path` chooses the format:

  - `.stablehlo`: for JAX, by `jax.export`; one file for all `platforms`.
  - `.onnx`: for ONNX Runtime and others, operators of version 17; needs `pip install 'sapr_jax[onnx]'`.
  - `.safetensors`: weights in PyTorch's names, as `export_torch` writes them. (`save` writes those in Flax's.)

  The first two hold the weights and map images `[batch, height, width, channels]` to what the model returns. In ONNX
  the input is called "images", and the output "logits". Beside them, `NAME.SUFFIX.json` says what goes in, what comes
  out, and how wide the layers are.

  Args:
    path: File to write; an older one is replaced, and parents are made.
    model: The network, dense or pruned; it is run in evaluation mode.
    variables: Its variables, all collections; left out for a module of NNX, `export(path, module, input_shape)`.
    input_shape: `[batch, height, width, channels]`; the batch in it does not count.
    batch: Number of images in a call; None: any.
    platforms: Where StableHLO is to run: of "cpu", "cuda", "rocm", "tpu".
    dtype: Dtype to compute in, such as jnp.bfloat16, instead of the model's own; kernels are stored in it, so the
      file is half as large. The model must have the field `dtype`. ONNX takes float32 and float16.
    preprocess: Function that is run on the images before the model, such as a normalization of uint8 images.
    input_dtype: Dtype of the images; None: uint8 with `preprocess`, else float32.
    apply_kwargs: As in `trace_channels`.
    class_names: Written beside the program.

  Raises:
    InputError: If the suffix, an option or the path cannot be used, something does not fit `model`, the model does not
      run with any number of images (give `batch`), or has an operation that is not known for ONNX.

  Example:
    >>> import pathlib, tempfile
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model, variables = nn.Dense(3), {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   file = pathlib.Path(directory) / "model.stablehlo"
    ...   sapr.export(file, model, variables, input_shape=(1, 2))
    ...   served = jax.export.deserialize(bytearray(file.read_bytes()))
    >>> served.call(jnp.ones((2, 2))).tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
  """
  path = check_path(path)
  if path.suffix not in SUFFIXES:
    raise InputError(f"path must end in {' or '.join(SUFFIXES)}, which chooses the format, got {shown(str(path))}.")
  _, variables, (input_shape, *_) = network_of(model, variables, (input_shape,))
  if path.suffix == ".safetensors":
    options = {"batch": batch, "dtype": dtype, "preprocess": preprocess, "input_dtype": input_dtype}
    options |= {"apply_kwargs": apply_kwargs, "class_names": class_names}
    if given := [name for name, value in options.items() if value is not None]:
      raise InputError(f"{', '.join(given)}: a .safetensors file holds weights alone; leave it out.")
    check_module(model)
    export_torch(path, model, variables, input_shape=input_shape)  # type: ignore[arg-type]
    return
  if preprocess is not None:
    check_function("preprocess", preprocess, "such as lambda images: images / 255")
  if batch is not None:
    check_integer("batch", batch, 1)
  dtype = None if dtype is None else check_dtype("dtype", dtype)
  names = _checked_names(class_names)
  images = abstract_image(
    input_shape, input_dtype if input_dtype is not None else jnp.float32 if preprocess is None else jnp.uint8
  )
  run, weights = _server(model, variables, dtype, preprocess, dict(apply_kwargs or {}))

  def serve(images: jax.Array) -> Any:
    return run(_constants(weights), images)

  cure = "Pass variables of this model, and input_shape and input_dtype of what it takes"
  with errors_of_model(f"The model, its variables and an input {images.dtype}{list(images.shape)}", cure=cure):
    output = jax.eval_shape(serve, images)
  spec = jax.ShapeDtypeStruct((batch or _symbolic_batch(), *images.shape[1:]), images.dtype)
  if path.suffix == ".onnx":
    data, about = _to_onnx(serve, spec, output, dtype, type(_base(model)).__name__)
  else:
    served = _fast_on_cpus(run, weights) if has_fast_layers(run, weights, images) else serve
    data, about = _to_stablehlo(served, spec, _checked_platforms(platforms))
  definition = definition_of(model)
  about = {
    "format": FORMAT,
    "sapr_jax": __version__,
    "jax": jax.__version__,
    "class": definition["base"]["class"],
    "widths": definition["widths"],
    "cuts": definition.get("cuts", ()),
    "input": {"shape": [batch or "batch", *images.shape[1:]], "dtype": images.dtype.name},
    "output": jax.tree.map(
      lambda leaf: {"shape": [batch or "batch", *leaf.shape[1:]], "dtype": leaf.dtype.name}, output
    ),
    "is_preprocessing_inside": preprocess is not None,
    "class_names": names,
    **about,
  }
  with os_errors_in_one_line(path):
    if os.path.lexists(path) and not path.is_file():
      raise InputError(f"{path} exists and is not a file; name another one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    write_json(metadata_file(path), about)


def metadata_file(path: pathlib.Path) -> pathlib.Path:
  """Returns the file beside an exported program that describes it."""
  return path.with_name(f"{path.name}.json")


def _server(
  model: Any, variables: Mapping[str, Any], dtype: Any, preprocess: Any, apply_kwargs: Mapping[str, Any]
) -> tuple[Callable[[Any, jax.Array], Any], dict[str, Any]]:
  """Returns the function of weights and images that is exported, and the weights as NumPy arrays."""
  if is_nnx(model):  # whose random keys are no numbers; those that it holds stay
    variables = {collection: tree for collection, tree in variables.items() if collection != "rngkey"}
  flat = {tuple(name.split("/")): np.asarray(leaf) for name, leaf in named_arrays(variables).items()}
  if dtype is not None:
    model = _with_dtype(model, dtype)
    # A layer rounds its kernel to the dtype itself; the small rest it reads in float32.
    flat = {key: leaf.astype(dtype) if key[-1] == "kernel" else leaf for key, leaf in flat.items()}

  def run(weights: Any, images: jax.Array) -> Any:
    inputs = images if preprocess is None else preprocess(images)
    return evaluate(model, weights, inputs, **apply_kwargs)

  return run, traverse_util.unflatten_dict(flat)


def _constants(weights: Any) -> Any:
  """Makes the weights constants of the program that is being traced."""
  return jax.tree.map(jnp.asarray, weights)


def _fast_on_cpus(run: Callable[[Any, jax.Array], Any], weights: Any) -> Callable[[jax.Array], Any]:
  """Returns the function of the images which has the forms of layers that are fast on CPUs, where it runs on one.

  The program stands twice in the file then, and the weights once, as they are passed to both.
  """

  def serve(images: jax.Array) -> Any:
    return jax.lax.platform_dependent(_constants(weights), images, cpu=with_fast_layers(run), default=run)

  return serve


def _base(model: Any) -> Any:
  return model.base if isinstance(model, NarrowModule) else model


def _with_dtype(model: Any, dtype: Any) -> nn.Module:
  base = _base(model)
  if is_nnx(base) or not hasattr(base, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
    raise InputError(
      "dtype must be one of floats, for a linen model with the field dtype,"
      f" got {dtype.name} for a {type(base).__name__}; leave it out, or build the model for it."
    )
  base = base.clone(dtype=dtype)
  return NarrowModule(base, model.widths, model.cuts) if isinstance(model, NarrowModule) else base


def _symbolic_batch() -> Any:
  return jax.export.symbolic_shape("batch")[0]


def _any_batch_failed(spec: jax.ShapeDtypeStruct, error: Exception) -> InputError:
  if isinstance(spec.shape[0], int):
    return InputError(f"The model cannot be exported: {one_line(error, 300)}")
  return InputError(
    f"The model does not run with any number of images ({one_line(error, 200)}); give the number, such as batch=1."
  )


def _to_stablehlo(serve: Any, spec: jax.ShapeDtypeStruct, platforms: Sequence[str]) -> tuple[bytes, dict[str, Any]]:
  try:
    with _without_source_paths():
      exported = jax.export.export(jax.jit(serve), platforms=platforms)(spec)
  except Exception as error:  # the model's code may fail in any way
    raise _any_batch_failed(spec, error) from error
  about = {"platforms": list(platforms), "calling_convention_version": exported.calling_convention_version}
  return bytes(exported.serialize(vjp_order=0)), about


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
  """Lets programs that are traced in the block say nothing of the files of this machine."""
  option = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, option)
  jax.config.update(option, 0)
  try:
    yield
  finally:
    jax.config.update(option, before)


def _to_onnx(
  serve: Any, spec: jax.ShapeDtypeStruct, output: Any, dtype: Any, name: str
) -> tuple[bytes, dict[str, Any]]:
  if not isinstance(output, jax.ShapeDtypeStruct):
    raise InputError("ONNX: the model must return one array; export it to a path that ends in .stablehlo.")
  if dtype is not None and dtype.name not in ("float32", "float16"):
    raise InputError(f"dtype must be float32 or float16 for ONNX, got {dtype.name}; .stablehlo takes all.")
  try:
    closed = jax.make_jaxpr(serve)(spec)
  except Exception as error:
    raise _any_batch_failed(spec, error) from error
  return onnx_model(closed, name).SerializeToString(), {"opset": OPSET}


def _checked_platforms(platforms: Any) -> tuple[str, ...]:
  found = (platforms,) if isinstance(platforms, str) else platforms
  is_list = isinstance(found, Sequence) and len(found) > 0
  if not is_list or not all(isinstance(p, str) and p in _KNOWN_PLATFORMS for p in found):
    raise InputError(f"platforms must be some of {', '.join(_KNOWN_PLATFORMS)}, got {shown(platforms)}.")
  return tuple(found)


def _checked_names(names: Any) -> list[str] | None:
  if names is None:
    return None
  if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
    raise InputError(f"class_names must be a list of names, got {shown(names)}.")
  return list(names)
