"""What a pickle of tensors says, read without unpickling: its opcodes are interpreted here, by hand.

Python's own unpickler runs what a file tells it to. This one builds dictionaries, lists, tuples, numbers, text and
descriptions of tensors. A file can name functions and classes, but they are only names here: none is imported, called
or instantiated, and no attribute of any object is set.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

MAX_OPCODES = 4_000_000
"""A state dict has about twenty a tensor. What the longest pickle builds takes about a gigabyte."""

_STORAGES: dict[str, Any] = {
  "torch.DoubleStorage": np.float64,
  "torch.FloatStorage": np.float32,
  "torch.HalfStorage": np.float16,
  "torch.BFloat16Storage": jnp.bfloat16,
  "torch.LongStorage": np.int64,
  "torch.IntStorage": np.int32,
  "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8,
  "torch.ByteStorage": np.uint8,
  "torch.BoolStorage": np.bool_,
}

# What training scripts save beside the weights. It is no more than a name here, whatever is made of it `IGNORED`.
_IGNORED_NAMES = frozenset(
  [
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.device",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "frozenset", "list", "set")),
    *(f"torch.{name}" for name in ("bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8")),
  ]
)


class ForeignGlobal(Exception):  # noqa: N818  (says what was found; it is no failure of the reader)
  """The pickle names something that no state dict has."""


class _Ignored:
  """Stands for everything that is neither a container, a number, text nor a tensor."""

  def __repr__(self) -> str:
    return "IGNORED"


IGNORED = _Ignored()


@dataclasses.dataclass(frozen=True)
class Global:
  """A name in the pickle."""

  name: str


@dataclasses.dataclass(frozen=True)
class Storage:
  """Where the numbers of tensors lie.

  Attributes:
    dtype: Their dtype, in the byte order of this machine.
    key: Its name in the file.
    size: Number of entries, as the pickle has it: to be checked against the file.
  """

  dtype: np.dtype
  key: str
  size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor as the pickle describes it; nothing is checked yet.

  Attributes:
    storage: Where its numbers lie.
    offset: Entry at which it begins.
    shape: Its shape.
    strides: Entries from one index to the next, of each axis.
  """

  storage: Any
  offset: Any
  shape: Any
  strides: Any


def read_pickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
  """Reads one pickle and leaves `file` behind it.

  Args:
    file: Bytes in memory: a length that a pickle claims is then no more than what is there.

  Returns:
    (object, key -> storage of all its tensors). The object is of containers, numbers, text, `StoredTensor`, `Storage`,
    `Global` and `IGNORED`.

  Raises:
    ForeignGlobal: If the pickle names a global that is not on the list; the argument is its name.
    ValueError: If it is damaged, too long, or has an opcode that torch.save does not write.
  """
  machine = _Machine()
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
      if count == MAX_OPCODES:
        raise ValueError(f"more than {MAX_OPCODES} opcodes")
      machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.storages
  except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
    raise ValueError(f"its pickle makes no sense ({type(error).__name__})") from error


class _Machine:
  """The stack, its marks and the memo of a pickle, and the storages it has named."""

  def __init__(self) -> None:
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}
    self.storages: dict[str, Storage] = {}

  def step(self, name: str, argument: Any) -> None:
    if name in _PUSHES:
      self.stack.append(argument)
    elif name in _MAKES:
      self.stack.append(_MAKES[name]())
    elif name in _ACTIONS:
      _ACTIONS[name](self, argument)
    elif name not in ("PROTO", "FRAME", "STOP"):
      raise ValueError(f"it has the opcode {name}, which torch.save does not write")

  def pop_to_mark(self) -> list[Any]:
    start = self.marks.pop()
    items = self.stack[start:]
    del self.stack[start:]
    return items

  def mark(self, _: Any) -> None:
    self.marks.append(len(self.stack))

  def pop(self, _: Any) -> None:
    if self.marks and self.marks[-1] == len(self.stack):
      self.marks.pop()
    else:
      self.stack.pop()

  def forget_marked(self, _: Any) -> None:
    self.pop_to_mark()

  def duplicate(self, _: Any) -> None:
    self.stack.append(self.stack[-1])

  def put(self, index: int | None) -> None:
    self.memo[len(self.memo) if index is None else index] = self.stack[-1]

  def get(self, index: int) -> None:
    self.stack.append(self.memo[index])

  def tuple_of(self, count: int | None, _: Any) -> None:
    items = self.pop_to_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
    self.stack.append(tuple(items))

  def list_of_marked(self, _: Any) -> None:
    self.stack.append(self.pop_to_mark())

  def frozen_set(self, _: Any) -> None:
    self.pop_to_mark()
    self.stack.append(IGNORED)

  def dict_of_marked(self, _: Any) -> None:
    items = self.pop_to_mark()
    self.stack.append({})
    self.set_pairs(items)

  def append(self, marked: bool, _: Any) -> None:
    items = self.pop_to_mark() if marked else [self.stack.pop()]
    if isinstance(self.stack[-1], list):
      self.stack[-1].extend(items)
    elif self.stack[-1] is not IGNORED:
      raise ValueError("its pickle appends to what is no list")

  def set_items(self, marked: bool, _: Any) -> None:
    items = self.pop_to_mark() if marked else [self.stack.pop() for _ in range(2)][::-1]
    self.set_pairs(items)

  def set_pairs(self, items: list[Any]) -> None:
    pairs = _pairs(zip(items[::2], items[1::2], strict=True))
    if isinstance(self.stack[-1], dict):
      self.stack[-1].update(pairs)
    elif self.stack[-1] is not IGNORED:
      raise ValueError("its pickle sets entries of what is no dictionary")

  def find_global(self, argument: str) -> None:
    self.stack.append(_known_global(argument.replace(" ", ".", 1)))

  def find_stacked_global(self, _: Any) -> None:
    name, module = self.stack.pop(), self.stack.pop()
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError("its pickle has a global without a name")
    self.stack.append(_known_global(f"{module}.{name}"))

  def find_instance(self, argument: str) -> None:
    self.pop_to_mark()
    _known_global(argument.replace(" ", ".", 1))
    self.stack.append(IGNORED)

  def make(self, with_keywords: bool, _: Any) -> None:
    """REDUCE and NEWOBJ call something; here a few names have a meaning, and the others none."""
    if with_keywords:
      self.stack.pop()
    arguments, what = self.stack.pop(), self.stack.pop()
    if not isinstance(what, Global) or not isinstance(arguments, tuple):
      raise ValueError("its pickle calls what is no function")
    self.stack.append(_MEANINGS[what.name](*arguments) if what.name in _MEANINGS else IGNORED)

  def build(self, _: Any) -> None:
    """BUILD sets the attributes of an object; no object here has any. (PyTorch: the versions of modules.)"""
    self.stack.pop()

  def storage(self, _: Any) -> None:
    kind, dtype, key, _, size, *view = self.stack.pop()
    if kind != "storage" or any(part is not None for part in view):
      raise ValueError("it holds a storage of a kind that torch has not saved since version 0.4")
    if dtype.name not in _STORAGES or not isinstance(key, str) or type(size) is not int:
      raise ValueError("it describes a storage in another way than torch.save does")
    storage = Storage(np.dtype(_STORAGES[dtype.name]), key, size)
    if self.storages.setdefault(key, storage) != storage:
      raise ValueError("it describes one storage in two ways")
    self.stack.append(storage)


def _pairs(items: Iterable[Any]) -> dict[Any, Any]:
  return {key: value for key, value in items if _is_key(key)}


def _is_key(key: Any) -> bool:
  """Names and indices. Others need not be kept, and nested or huge ones would take their time to be hashed."""
  return len(key) < 1000 if isinstance(key, str) else isinstance(key, int) and key.bit_length() <= 64


def _known_global(name: str) -> Global:
  if name not in _MEANINGS and name not in _STORAGES and name not in _IGNORED_NAMES:
    raise ForeignGlobal(name if name.isprintable() and len(name) < 100 else ascii(name)[:100])
  return Global(name)


def _ordered_dict(items: Iterable[Any] = ()) -> dict[Any, Any]:
  return _pairs(items)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
  return StoredTensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
  return data


_MEANINGS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _ordered_dict,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": _parameter,
  "torch._utils._rebuild_parameter_with_state": _parameter,
}

_PUSHES = frozenset(
  (
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
  )
)

_MAKES: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "EMPTY_SET": lambda: IGNORED,
}


def _with(action: Callable[..., None], value: Any) -> Callable[[_Machine, Any], None]:
  return lambda machine, argument: action(machine, value, argument)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
  "MARK": _Machine.mark,
  "POP": _Machine.pop,
  "POP_MARK": _Machine.forget_marked,
  "DUP": _Machine.duplicate,
  **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
  **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
  "TUPLE": _with(_Machine.tuple_of, None),
  "TUPLE1": _with(_Machine.tuple_of, 1),
  "TUPLE2": _with(_Machine.tuple_of, 2),
  "TUPLE3": _with(_Machine.tuple_of, 3),
  "LIST": _Machine.list_of_marked,
  "DICT": _Machine.dict_of_marked,
  "APPEND": _with(_Machine.append, False),
  "APPENDS": _with(_Machine.append, True),
  "ADDITEMS": _with(_Machine.append, True),
  "FROZENSET": _Machine.frozen_set,
  "SETITEM": _with(_Machine.set_items, False),
  "SETITEMS": _with(_Machine.set_items, True),
  "GLOBAL": _Machine.find_global,
  "STACK_GLOBAL": _Machine.find_stacked_global,
  "INST": _Machine.find_instance,
  "REDUCE": _with(_Machine.make, False),
  "NEWOBJ": _with(_Machine.make, False),
  "NEWOBJ_EX": _with(_Machine.make, True),
  "BUILD": _Machine.build,
  "BINPERSID": _Machine.storage,
}
