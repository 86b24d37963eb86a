"""A JAX program as an ONNX graph.

Equations that depend on the weights alone are computed here, so batch normalization becomes a product and a sum, which
runtimes fold into the convolution before, and a maximum with a number becomes the activation that they fuse with it.
Arrays stay in the layout that convolutions of ONNX have (NCHW): the only transposition left is that of the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from sapr_jax.errors import InputError

OPSET = 17
"""Version of the operators: the one that runtimes since 2022 know."""

_IR_VERSION = 8  # the format of files that came with it
_INLINED = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "custom_vjp_call_jaxpr": "fun_jaxpr",
  "checkpoint": "jaxpr",
  "remat": "jaxpr",
  "remat2": "jaxpr",
}
"""Primitive that calls a program -> its parameter with that program."""

_ELEMENTWISE = {
  "add": "Add",
  "add_any": "Add",
  "sub": "Sub",
  "mul": "Mul",
  "div": "Div",
  "max": "Max",
  "min": "Min",
  "pow": "Pow",
  "neg": "Neg",
  "abs": "Abs",
  "exp": "Exp",
  "log": "Log",
  "tanh": "Tanh",
  "logistic": "Sigmoid",
  "sqrt": "Sqrt",
  "erf": "Erf",
  "floor": "Floor",
  "eq": "Equal",
  "lt": "Less",
  "le": "LessOrEqual",
  "gt": "Greater",
  "ge": "GreaterOrEqual",
  "and": "And",
  "or": "Or",
  "not": "Not",
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


@dataclasses.dataclass(frozen=True)
class _Node:
  """An array that the graph computes.

  Attributes:
    name: In the graph.
    order: The graph's axis i is axis `order[i]` in JAX.
  """

  name: str
  order: tuple[int, ...]


_Value = Any
"""A `_Node`, or a NumPy array that is known, which may have size 1 where it is yet to be repeated."""


def onnx_model(closed: Any, name: str) -> Any:
  """Returns the `onnx.ModelProto` of a program with one input and one output.

  Args:
    closed: Closed jaxpr; the first axis of its input may be symbolic, and is then called "batch".
    name: Of the graph.

  Raises:
    InputError: If ONNX is not installed, or the program has an operation that has no rule here; the message names it.
  """
  try:
    import onnx
  except ImportError:
    raise InputError("Writing ONNX needs the package onnx: pip install 'sapr_jax[onnx]'.") from None
  writer = _Writer(onnx)
  (source,), (result,) = closed.jaxpr.invars, closed.jaxpr.outvars
  given = _Node("images", tuple(range(source.aval.ndim)))
  (value,) = writer.run(closed.jaxpr, closed.consts, [given])
  last = writer.node("Identity", [writer.plain(value, result.aval.shape)], name="logits")
  onnx.checker.check_model(
    model := onnx.helper.make_model(
      onnx.helper.make_graph(
        writer.nodes,
        name,
        [writer.described("images", source.aval)],
        [writer.described(last, result.aval)],
        writer.constants,
      ),
      opset_imports=[onnx.helper.make_opsetid("", OPSET)],
      producer_name="sapr_jax",
      ir_version=_IR_VERSION,
    )
  )
  return model


class _Writer:
  """Collects nodes and constants while it goes through a program."""

  def __init__(self, onnx: Any) -> None:
    self.onnx = onnx
    self.nodes: list[Any] = []
    self.constants: list[Any] = []

  def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value]) -> list[_Value]:
    """Writes the equations of a program; returns its results."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(np.asarray, consts), *args], strict=True))

    def read(atom: Any) -> _Value:
      if not isinstance(atom, Literal):
        return values[atom]
      aval: Any = atom.aval
      return np.asarray(atom.val, aval.dtype)

    for eqn in jaxpr.eqns:
      results = self._equation(eqn, [read(atom) for atom in eqn.invars])
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, eqn: Any, operands: list[_Value]) -> list[_Value]:
    name = eqn.primitive.name
    if name in _INLINED:
      inner = eqn.params[_INLINED[name]]
      return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
    if name == "dim_as_value":  # the size of an array, as a number
      raise InputError("ONNX: the model computes with the number of images; give it, such as batch=1.")
    if name == "broadcast_in_dim":
      return [self._broadcast(eqn, operands[0])]
    if not any(isinstance(operand, _Node) for operand in operands) and not eqn.primitive.multiple_results:
      return [self._known(eqn, operands)]
    for atom in (*eqn.invars, *eqn.outvars):
      _check_dtype(atom.aval.dtype)
    if name in _ELEMENTWISE:
      return [self.elementwise(_ELEMENTWISE[name], operands, eqn.outvars[0].aval.shape)]
    if name not in _RULES:
      raise InputError(
        f"The model has the operation {name}, which has no rule for ONNX; export it to a path that ends in .stablehlo."
      )
    return [_RULES[name](self, eqn, operands)]

  def _known(self, eqn: Any, operands: list[Any]) -> np.ndarray:
    """Computes an equation without the input; arrays that are yet to be repeated stay so if it is elementwise."""
    if eqn.primitive.name not in _KEEP_ONES:
      shapes = [_static(atom.aval.shape) for atom in eqn.invars]
      operands = [np.broadcast_to(a, shape) for a, shape in zip(operands, shapes, strict=True)]
    elif len(operands) > 1:  # lax wants equal shapes
      operands = list(np.broadcast_arrays(*operands))
    if (quick := _IN_NUMPY.get(eqn.primitive.name)) is not None:  # nothing to compile
      # NumPy makes numbers of arrays without axes.
      return np.asarray(quick(*operands, **eqn.params) if eqn.primitive.name in _WITH_PARAMS else quick(*operands))
    return np.asarray(eqn.primitive.bind(*map(jax.numpy.asarray, operands), **eqn.params))

  def _broadcast(self, eqn: Any, operand: _Value) -> _Value:
    shape, source = eqn.params["shape"], eqn.invars[0].aval.shape
    places = eqn.params["broadcast_dimensions"]
    if isinstance(operand, np.ndarray):  # the next operation repeats it
      sizes = dict(zip(places, operand.shape, strict=True))
      return operand.reshape([sizes.get(axis, 1) for axis in range(len(shape))])
    own = dict(zip(places, source, strict=True))
    ones = [own.get(axis, 1) for axis in range(len(shape))]
    value = self.reshaped(self.plain(operand, source), ones) if len(ones) > len(source) else operand
    repeats = _static([1 if size == one else size for size, one in zip(shape, ones, strict=True)])
    if set(repeats) == {1}:
      return value
    target = self.integers([repeats[axis] for axis in value.order])
    return _Node(self.node("Expand", [value.name, target]), value.order)

  def elementwise(self, op: str, operands: list[_Value], shape: Sequence[Any]) -> _Node:
    """Writes an operation on each entry; `shape` is that of the result."""
    match sorted(operands, key=lambda operand: isinstance(operand, np.ndarray)):
      case [_Node() as value, np.ndarray(size=1) as bound] if (
        op in ("Max", "Min") and bound.dtype.kind == "f" and len(value.order) == len(shape)
      ):
        return self._bounded(op, value, bound.reshape(()))
    if op == "Sub" and isinstance(operands[1], np.ndarray):
      op, operands = "Add", [operands[0], np.asarray(-operands[1])]  # which runtimes fold into a convolution
    names, order = self.together(operands, shape)
    return _Node(self.node(op, names), order)

  def together(self, operands: Sequence[_Value], shape: Sequence[Any]) -> tuple[list[str], tuple[int, ...]]:
    """Returns the names of arrays of this shape, and of numbers, such that they fit together, and their order."""
    orders = [operand.order for operand in operands if isinstance(operand, _Node) and len(operand.order) == len(shape)]
    if not orders:  # only numbers are computed, and the result has the shape of what is known
      plain = tuple(range(len(shape)))
      return [
        self.plain(operand, shape) if isinstance(operand, np.ndarray) and operand.ndim else self.stored(operand, plain)
        for operand in operands
      ], plain
    order = max(orders, key=lambda order: order != tuple(sorted(order)))
    return [self.stored(operand, order) for operand in operands], order

  def _bounded(self, op: str, value: _Node, bound: np.ndarray) -> _Node:
    """Writes a maximum or minimum with a number as the activation that runtimes fuse with the layer before."""
    if op == "Max" and not bound:
      return _Node(self.node("Relu", [value.name]), value.order)
    limits = [self.constant(bound)] if op == "Max" else ["", self.constant(bound)]
    return _Node(self.node("Clip", [value.name, *limits]), value.order)

  def node(self, op: str, inputs: Sequence[str], name: str | None = None, **attributes: Any) -> str:
    """Adds a node; returns the name of its result."""
    name = name or f"{op.lower()}_{len(self.nodes)}"
    self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
    return name

  def constant(self, array: Any, dtype: Any = None) -> str:
    name = f"constant_{len(self.constants)}"
    self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(array, dtype, order="C"), name))
    return name

  def integers(self, values: Sequence[Any]) -> str:
    return self.constant(np.reshape(values, (len(values),)), np.int64)

  def stored(self, value: _Value, order: tuple[int, ...]) -> str:
    """Returns the name of a value in the graph, with its axes in this order."""
    if isinstance(value, np.ndarray):
      if value.ndim == 0:
        return self.constant(value)
      array = value.transpose(order)
      leading = next((axis for axis, size in enumerate(array.shape) if size != 1), array.ndim)
      return self.constant(array.reshape(array.shape[leading:]) if leading else array)
    if value.order in (order, ()):  # a number goes with any array
      return value.name
    return self.node("Transpose", [value.name], perm=[value.order.index(axis) for axis in order])

  def plain(self, value: _Value, shape: Sequence[Any]) -> str:
    """Returns the name of a value in the order of JAX, at its whole shape."""
    if isinstance(value, np.ndarray):
      return self.constant(np.broadcast_to(value, _static(shape)))
    return self.stored(value, tuple(range(len(shape))))

  def reshaped(self, name: str, shape: Sequence[Any]) -> _Node:
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
      raise InputError("ONNX: the model joins the batch with another axis; give the number of images, batch=1.")
    return _Node(self.node("Reshape", [name, self.integers(sizes)]), tuple(range(len(sizes))))

  def described(self, name: str, aval: Any) -> Any:
    kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
    shape = [size if isinstance(size, int) else "batch" for size in aval.shape]
    return self.onnx.helper.make_tensor_value_info(name, kind, shape)


_WITH_PARAMS = {
  "convert_element_type": lambda array, new_dtype, **_: array.astype(new_dtype),
  "reshape": lambda array, new_sizes, **_: array.reshape(new_sizes),
  "squeeze": lambda array, dimensions, **_: np.squeeze(array, dimensions),
}
_IN_NUMPY: dict[str, Callable[..., Any]] = {
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "rsqrt": lambda array: (1 / np.sqrt(array)).astype(array.dtype),
  **_WITH_PARAMS,
}
_KEEP_ONES = {*_ELEMENTWISE, "convert_element_type", "rsqrt", "integer_pow", "square", "copy", "stop_gradient"}


def _check_dtype(dtype: Any) -> None:
  if getattr(dtype, "isbuiltin", 1) != 1:  # bfloat16 and the like, which are NumPy's by an extension
    raise InputError(
      f"ONNX: the model and its images must be of float32 or float16, got {dtype}; give dtype=jnp.float32 and such"
      " images, or export it to a path that ends in .stablehlo, which takes all."
    )


def _static(shape: Sequence[Any]) -> tuple[int, ...]:
  if not all(isinstance(size, int) for size in shape):
    raise InputError("ONNX: the model makes a constant for each image of a batch; give the number of images, batch=1.")
  return tuple(shape)


def _convolution(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  numbers, params, (image, kernel) = eqn.params["dimension_numbers"], eqn.params, operands
  if not isinstance(kernel, np.ndarray) or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
    raise InputError("ONNX: the model has a transposed convolution, or one with a kernel that depends on the image.")
  kernel = np.broadcast_to(kernel, eqn.invars[1].aval.shape).transpose(numbers.rhs_spec)
  name = writer.node(
    "Conv",
    [_whole(writer, image, eqn.invars[0], numbers.lhs_spec), writer.constant(kernel)],
    strides=params["window_strides"],
    dilations=params["rhs_dilation"],
    group=params["feature_group_count"],
    pads=_pads(params["padding"]),
  )
  return _Node(name, tuple(numbers.out_spec))


def _whole(writer: _Writer, value: _Value, atom: Any, order: Sequence[int]) -> str:
  if isinstance(value, np.ndarray):
    value = np.broadcast_to(value, _static(atom.aval.shape))
  return writer.stored(value, tuple(order))


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
  if any(low < 0 or high < 0 for low, high in padding):
    raise InputError("ONNX: the model has a negative padding, which ONNX does not have.")
  return [low for low, _ in padding] + [high for _, high in padding]


def _pooling(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  params, order = eqn.params, (0, 3, 1, 2)
  window = params["window_dimensions"]
  is_plain = set(params["base_dilation"]) == {1} and (window[0], window[-1]) == (1, 1) and len(window) == 4
  if not is_plain or (params["padding"][0], params["padding"][-1]) != ((0, 0), (0, 0)):
    raise InputError("ONNX: the model pools along other axes than height and width.")
  source = writer.stored(operands[0], order)
  common = {"kernel_shape": window[1:3], "strides": params["window_strides"][1:3]}
  common["pads"] = _pads(params["padding"][1:3])
  if eqn.primitive.name == "reduce_window_max":
    return _Node(writer.node("MaxPool", [source], dilations=params["window_dilation"][1:3], **common), order)
  if set(params["window_dilation"]) != {1}:
    raise InputError("ONNX: the model has a dilated average pooling.")
  mean = writer.node("AveragePool", [source], count_include_pad=1, **common)
  return _Node(writer.node("Mul", [mean, writer.constant(window[1] * window[2], eqn.invars[0].aval.dtype)]), order)


def _reduction(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  (value,), axes, op = operands, eqn.params["axes"], _REDUCTIONS[eqn.primitive.name]
  places = [value.order.index(axis) for axis in axes]
  if not places:  # ONNX would take that for all of them
    return value
  if op == "ReduceSum":
    name = writer.node(op, [value.name, writer.integers(places)], keepdims=0)
  else:
    name = writer.node(op, [value.name], axes=places, keepdims=0)
  rest = [axis for axis in value.order if axis not in axes]
  return _Node(name, tuple(sorted(rest).index(axis) for axis in rest))


def _product(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  (left_axes, right_axes), batch_axes = eqn.params["dimension_numbers"]
  left, right = (atom.aval for atom in eqn.invars)
  if batch_axes != ((), ()) or len(left_axes) != 1 or right.ndim != 2:
    raise InputError("ONNX: the model has a product of arrays that is not one with a matrix.")
  order = (*(axis for axis in range(left.ndim) if axis != left_axes[0]), left_axes[0])
  factors = [
    _whole(writer, operands[0], eqn.invars[0], order),
    _whole(writer, operands[1], eqn.invars[1], (right_axes[0], 1 - right_axes[0])),
  ]
  return _Node(writer.node("MatMul", factors), tuple(range(left.ndim)))


def _reshape(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  return writer.reshaped(writer.plain(operands[0], eqn.invars[0].aval.shape), eqn.outvars[0].aval.shape)


def _transpose(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  new = eqn.params["permutation"]
  return _Node(operands[0].name, tuple(new.index(axis) for axis in operands[0].order))


def _pad(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  (value, fill), padding = operands, eqn.params["padding_config"]
  if not isinstance(fill, np.ndarray) or any(inner for _, _, inner in padding):
    raise InputError("ONNX: the model pads between the entries of an array.")
  pads = [padding[axis][side] for side in (0, 1) for axis in value.order]  # negative ones crop, as in JAX
  return _Node(writer.node("Pad", [value.name, writer.integers(pads), writer.constant(fill)]), value.order)


def _slice(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  (value,), params, shape = operands, eqn.params, eqn.invars[0].aval.shape
  steps = params["strides"] or (1,) * len(shape)
  cut = [
    axis
    for axis in range(len(shape))
    if (params["start_indices"][axis], params["limit_indices"][axis], steps[axis]) != (0, shape[axis], 1)
  ]
  bounds = [
    writer.integers([entries[axis] for axis in cut]) for entries in (params["start_indices"], params["limit_indices"])
  ]
  axes = writer.integers([value.order.index(axis) for axis in cut])
  last = writer.integers([steps[axis] for axis in cut])
  return _Node(writer.node("Slice", [value.name, *bounds, axes, last]), value.order)


def _gather(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  """Writes `x[:, ::2, ::2]` with any number of images, which is a gather along each axis in turn, and `x[:, 1:]`."""
  (value, places), numbers, shape = operands, eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
  if (piece := _piece(writer, eqn, value, places)) is not None:
    return piece
  axes = numbers.collapsed_slice_dims
  rest = tuple(axis for axis in range(len(shape)) if axis not in axes)
  good = isinstance(value, _Node) and isinstance(places, np.ndarray) and numbers.start_index_map == axes
  good = good and numbers.offset_dims == rest and not numbers.operand_batching_dims and places.ndim == len(axes) + 1
  good = good and all(
    size == (1 if axis in axes else shape[axis]) for axis, size in enumerate(eqn.params["slice_sizes"])
  )
  if good:
    lines = [np.moveaxis(places[..., k], k, 0).reshape(places.shape[k], -1)[:, 0] for k in range(len(axes))]
    good = all((a == b).all() for a, b in zip(np.moveaxis(places, -1, 0), np.ix_(*lines), strict=True))
    if good:
      for axis, line in zip(axes, lines, strict=True):
        gathered = [value.name, writer.integers(line)]
        value = _Node(writer.node("Gather", gathered, axis=value.order.index(axis)), value.order)
      return value
  raise InputError("ONNX: the model picks entries in a way that has no rule for ONNX; export it to .stablehlo.")


def _piece(writer: _Writer, eqn: Any, value: _Value, places: _Value) -> _Node | None:
  """Writes a gather of one piece at a known place as a slice; None if it is another one."""
  numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
  if not isinstance(value, _Node) or not isinstance(places, np.ndarray) or places.ndim != 1:
    return None
  if numbers.collapsed_slice_dims or numbers.operand_batching_dims:
    return None
  axes = numbers.start_index_map
  whole = all(sizes[axis] == size for axis, size in enumerate(shape) if axis not in axes)
  inside = all(
    isinstance(shape[axis], int) and 0 <= start <= shape[axis] - sizes[axis]
    for axis, start in zip(axes, places, strict=True)
  )
  if not whole or not inside:
    return None
  ends = [start + sizes[axis] for axis, start in zip(axes, places, strict=True)]
  where = writer.integers([value.order.index(axis) for axis in axes])
  return _Node(
    writer.node("Slice", [value.name, writer.integers(list(places)), writer.integers(ends), where]), value.order
  )


def _concatenate(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  order = next(value.order for value in operands if isinstance(value, _Node))
  parts = [_whole(writer, value, atom, order) for value, atom in zip(operands, eqn.invars, strict=True)]
  return _Node(writer.node("Concat", parts, axis=order.index(eqn.params["dimension"])), order)


def _convert(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  if eqn.invars[0].aval.dtype == eqn.params["new_dtype"]:
    return operands[0]
  kind = writer.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
  return _Node(writer.node("Cast", [operands[0].name], to=kind), operands[0].order)


def _power(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  exponent = writer.constant(eqn.params.get("y", 2), eqn.invars[0].aval.dtype)
  return _Node(writer.node("Pow", [operands[0].name, exponent]), operands[0].order)


def _rsqrt(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  root = writer.node("Sqrt", [operands[0].name])
  return _Node(writer.node("Reciprocal", [root]), operands[0].order)


def _select(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  which, *cases = operands
  if len(cases) != 2 or eqn.invars[0].aval.dtype != np.bool_:
    raise InputError("ONNX: the model selects among more than two arrays.")
  names, order = writer.together([which, *reversed(cases)], eqn.outvars[0].aval.shape)
  return _Node(writer.node("Where", names), order)


def _clamp(writer: _Writer, eqn: Any, operands: list[_Value]) -> _Node:
  (low, value, high), shape = operands, eqn.outvars[0].aval.shape
  return writer.elementwise("Min", [writer.elementwise("Max", [value, low], shape), high], shape)


_RULES: dict[str, Callable[[_Writer, Any, list[_Value]], _Value]] = {
  "conv_general_dilated": _convolution,
  "reduce_window_max": _pooling,
  "reduce_window_sum": _pooling,
  **dict.fromkeys(_REDUCTIONS, _reduction),
  "dot_general": _product,
  "reshape": _reshape,
  "squeeze": _reshape,
  "expand_dims": _reshape,
  "transpose": _transpose,
  "pad": _pad,
  "slice": _slice,
  "gather": _gather,
  "concatenate": _concatenate,
  "convert_element_type": _convert,
  "copy": lambda writer, eqn, operands: operands[0],
  "stop_gradient": lambda writer, eqn, operands: operands[0],
  "integer_pow": _power,
  "square": _power,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "clamp": _clamp,
}
"""Primitive -> (writer, equation, operands, of which one at least is a node) -> its result."""
