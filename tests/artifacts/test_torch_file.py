"""Files of torch.save: what is read, and that whatever else a file holds does nothing.

The files are put together here, opcode by opcode, so that most tests need no PyTorch and can say what torch.save never
would.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax import InputError
from sapr_jax.artifacts import torch_pickle
from sapr_jax.artifacts.torch_file import read_torch_file

WITHOUT_TORCH = "PyTorch is not installed: pip install 'sapr_jax[torch]'"
MAGIC = 0x1950A86A20F9469CFC6C

# ----------------------------------------------------------------------------------------------------------------------
# Writing files
# ----------------------------------------------------------------------------------------------------------------------


def say(value):
  """Returns the opcodes of a plain value; bytes are opcodes already."""
  return value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1]


def tuple_of(*items):
  return b"(" + b"".join(map(say, items)) + b"t"


def dict_of(entries):
  return b"}(" + b"".join(say(key) + say(value) for key, value in entries.items()) + b"u"


def name(module, attribute):
  return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
  return function + tuple_of(*arguments) + b"R"


def storage(key="0", size=6, kind="FloatStorage"):
  return tuple_of(b"X\x07\x00\x00\x00storage", name("torch", kind), text(key), text("cpu"), size) + b"Q"


def text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(of=None, offset=0, shape=(2, 3), strides=(3, 1)):
  rebuild = name("torch._utils", "_rebuild_tensor_v2")
  ordered = call(name("collections", "OrderedDict"))
  return call(rebuild, storage() if of is None else of, offset, tuple_of(*shape), tuple_of(*strides), False, ordered)


NUMBERS = np.arange(6, dtype="<f4")
STATE = dict_of({"weight": tensor()})
EXPECTED = {"weight": NUMBERS.reshape(2, 3)}


def write_zip(path, body, storages=None, byteorder=b"little", compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
    if byteorder is not None:
      archive.writestr("archive/byteorder", byteorder)
    for key, numbers in (storages or {"0": NUMBERS}).items():
      archive.writestr(f"archive/data/{key}", numbers.tobytes())
  return path


def write_legacy(path, body, storages=None):
  storages = storages or {"0": NUMBERS}
  pickles = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
  pickles += [b"\x80\x02" + body + b".", pickle.dumps(list(storages), 2)]
  raw = [struct.pack("<q", numbers.size) + numbers.tobytes() for numbers in storages.values()]
  path.write_bytes(b"".join(pickles + raw))
  return path


FORMATS = {"zip": write_zip, "legacy": write_legacy}


@pytest.fixture(params=FORMATS)
def write(request, tmp_path):
  """Writes a body, and storages, to a file of either format."""
  return lambda *content: FORMATS[request.param](tmp_path / "weights.pth", *content)


def assert_same(got, want):
  assert got.keys() == want.keys()
  for key, array in want.items():
    assert got[key].dtype == array.dtype, key
    np.testing.assert_array_equal(got[key], array)


# ----------------------------------------------------------------------------------------------------------------------
# What is read
# ----------------------------------------------------------------------------------------------------------------------


def test_a_state_dict(write):
  assert_same(read_torch_file(write(STATE)), EXPECTED)


@pytest.mark.parametrize(
  ("body", "want"),
  [
    (tensor(offset=1, shape=(2, 2), strides=(1, 2)), np.asarray([[1, 3], [2, 4]], np.float32)),
    (tensor(offset=5, shape=(), strides=()), np.asarray(5, np.float32)),
    (tensor(offset=6, shape=(0, 3), strides=(3, 1)), np.zeros((0, 3), np.float32)),
    (call(name("torch._utils", "_rebuild_parameter"), tensor(), True, b"N"), EXPECTED["weight"]),
    (call(name("torch._utils", "_rebuild_tensor"), storage(), 0, (6,), (1,)), NUMBERS),
    (tensor() + b"0" + tensor(), EXPECTED["weight"]),
  ],
  ids=["transposed view", "scalar", "empty", "parameter", "old tensor", "popped"],
)
def test_tensors(write, body, want):
  assert_same(read_torch_file(write(dict_of({"weight": body}))), {"weight": want})


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("DoubleStorage", np.float64),
    ("HalfStorage", np.float16),
    ("BFloat16Storage", jnp.bfloat16),
    ("LongStorage", np.int64),
    ("ByteStorage", np.uint8),
    ("BoolStorage", np.bool_),
  ],
)
def test_dtypes_and_byte_orders(tmp_path, kind, dtype):
  numbers = np.asarray([0, 1, 1, 0, 1, 1]).astype(dtype)
  body = dict_of({"weight": tensor(storage(kind=kind))})
  want = {"weight": numbers.reshape(2, 3)}
  assert_same(read_torch_file(write_legacy(tmp_path / "legacy.pth", body, {"0": numbers})), want)
  as_integers = numbers.view(f"u{numbers.itemsize}")
  for order, stored in ((b"little", as_integers), (b"big", as_integers.byteswap()), (None, as_integers)):
    assert_same(read_torch_file(write_zip(tmp_path / "zip.pth", body, {"0": stored}, order)), want)


def test_tensors_share_a_storage(write):
  shared = storage() + b"q\x05"
  body = dict_of({"a": tensor(shared), "b": tensor(b"h\x05", 4, (2,), (1,))})
  assert_same(read_torch_file(write(body)), {"a": EXPECTED["weight"], "b": NUMBERS[4:]})


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict"])
def test_checkpoints_that_hold_the_state_dict(write, key):
  momentum = dict_of({"state": dict_of({0: dict_of({"momentum_buffer": tensor(storage("1"))})}), "lr": 0.1})
  ordered = call(name("collections", "OrderedDict")) + STATE[1:] + dict_of({"_metadata": b"}"}) + b"b"
  entries = {"epoch": 3, "best": tensor(shape=(), strides=()), "optimizer": momentum, key: ordered}
  body = dict_of({**entries, "args": ["--lr", 0.1, None, True, 2**70, (1, "a")]})
  assert_same(read_torch_file(write(body, {"0": NUMBERS, "1": NUMBERS})), EXPECTED)
  configured = dict_of({"model": dict_of({"depth": 8}), key: STATE, "weights": dict_of({"gamma": 0.1})})
  assert_same(read_torch_file(write(configured)), EXPECTED)
  nested = dict_of({"model": dict_of({"state_dict": STATE})})
  assert_same(read_torch_file(write(nested)), EXPECTED)


def test_what_training_scripts_save_beside_the_weights(write):
  beside = {
    "args": argparse.Namespace(lr=0.1, deep=argparse.Namespace(x={1, 2})),
    "milestones": collections.Counter([30, 60]),
    "accuracy": np.float64(0.7),
    "array": np.ones(3),
    "raw": b"bytes",
    "lists": collections.defaultdict(list, a=[1]),
  }
  named = {
    "device": call(name("torch", "device"), "cuda:0"),
    "shape": call(name("torch", "Size"), (1, 2)),
    "dtype": name("torch", "float16"),
  }
  named = dict_of({**named, "state_dict": STATE})
  for protocol in (2, 4, 5):
    assert_same(read_torch_file(write(raw_pickle(beside, protocol) + named[1:])), EXPECTED)


def raw_pickle(value, protocol):
  """The opcodes of a pickle, without its header: frames only say how much to read at once."""
  content = pickle.dumps(value, protocol)
  return content[2:-1]


@pytest.mark.parametrize(
  ("body", "what"),
  [
    (tensor(), "a StoredTensor"),
    (say([1, 2]), "a list"),
    (say({}), "a dictionary of nothing"),
    (dict_of({"epoch": 3, "models": STATE}), "a dictionary of 'epoch', 'models'; expected tensors by name"),
    (dict_of({f"key{i}": i for i in range(20)}), "a dictionary of 'key0', .*, 'key7' and 12 more"),
    (dict_of({1: tensor()}), "a dictionary of 1"),
    (dict_of({"state_dict": dict_of({"a\nb": 1})}), r"a dictionary of 'a\\nb'"),
  ],
)
def test_files_without_a_state_dict_are_named(write, body, what):
  with pytest.raises(InputError, match=f"weights.pth holds no state dict but {what}") as info:
    read_torch_file(write(body))
  assert "\n" not in str(info.value)


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files
# ----------------------------------------------------------------------------------------------------------------------


class Calls:
  """Pickles as the call of a function."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


def hostile_bodies(marker):
  """(what is tried, the global that is refused, body); any of them would create `marker` if it were unpickled."""
  import os
  import subprocess

  command = f"touch {marker}"
  source = f"open({str(marker)!r}, 'w').close()"
  short = b"\x8c\x02os\x8c\x06system\x93" + text(command) + b"\x85R"
  system = name("os", "system")
  yield "os.system", "system", raw_pickle(Calls(os.system, command), 2)
  yield "eval", "eval", raw_pickle(Calls(eval, source), 4)
  yield "exec", "exec", raw_pickle(Calls(exec, source), 4)
  yield "Popen", "subprocess.Popen", raw_pickle(Calls(subprocess.Popen, ["touch", str(marker)]), 4)
  yield "open", "open", raw_pickle(Calls(open, str(marker), "w"), 5)
  yield "pickle in a pickle", "loads", raw_pickle(Calls(pickle.loads, pickle.dumps(Calls(eval, source))), 2)
  yield "stacked global", r"os\.system", short
  yield "among weights", r"os\.system", dict_of({"weight": tensor(), "bias": call(system, command)})
  yield "as an argument", r"os\.system", call(name("collections", "OrderedDict"), call(system, command))
  yield "as a key", r"os\.system", b"}" + call(system, command) + b"Ns"
  yield "as a storage", r"os\.system", dict_of({"w": tensor(tuple_of("storage", system, "0", "cpu", 6) + b"Q")})
  yield "INST", r"os\.system", b"(" + text(command) + b"ios\nsystem\n"
  yield "OBJ", r"os\.system", b"(" + system + text(command) + b"o"
  yield "NEWOBJ", r"os\.system", system + tuple_of(command) + b"\x81"
  yield "getattr", "getattr", call(name("builtins", "getattr"), name("os", "path"), "join")
  yield "attribute path", r"torch\.hub", call(b"\x8c\x05torch\x8c\x08hub.load\x93", "x")
  yield "a module's class", r"torch\.nn\.modules\.linear\.Linear", name("torch.nn.modules.linear", "Linear") + b")\x81"
  yield "line break", r"'os\\nsystem\.x'", b"\x8c\x09os\nsystem\x8c\x01x\x93"
  yield "torch.load", r"torch\.load", call(name("torch", "load"), str(marker))
  yield "set_default", "torch.UntypedStorage", name("torch", "UntypedStorage")


@pytest.mark.parametrize("index", range(20))
def test_a_file_that_names_a_function_is_refused_and_nothing_happens(write, tmp_path, index):
  marker = tmp_path / "owned"
  bodies = list(hostile_bodies(marker))
  assert len(bodies) == 20
  what, found, body = bodies[index]
  with pytest.raises(
    InputError, match=rf"weights\.pth contains .*{found}.*, which is not a tensor; save the state"
  ) as info:
    read_torch_file(write(body))
  assert "\n" not in str(info.value) and not marker.exists(), what


def test_the_hostile_files_would_do_harm(tmp_path):
  """The same bodies, given to Python: this is no test of files that are merely broken."""
  harm = 0
  for _, _, body in hostile_bodies(tmp_path / "owned"):
    try:
      made = pickle.loads(b"\x80\x04" + body + b".")
      if hasattr(made, "wait"):
        made.wait()
      if hasattr(made, "close"):
        made.close()
    except Exception:
      pass
    harm += (tmp_path / "owned").exists()
    (tmp_path / "owned").unlink(missing_ok=True)
  assert harm >= 11


@pytest.mark.parametrize(
  "body",
  [
    # BUILD would set attributes of what lies below it.
    STATE + dict_of({"__class__": 1, "__setstate__": 2, "update": 3}) + b"b",
    call(name("collections", "OrderedDict")) + STATE[1:] + dict_of({"__dict__": dict_of({"x": 1})}) + b"b",
    dict_of({"weight": tensor() + tuple_of(b"N", dict_of({"shape": (9, 9), "storage": 1})) + b"b"}),
    # Names without a meaning, called and built.
    dict_of({"weight": tensor(), "n": name("argparse", "Namespace") + b")\x81" + dict_of({"__class__": 1}) + b"b"}),
    dict_of({"weight": tensor(), "n": call(name("numpy", "ndarray"), 2**40) + text("x") + b"a"}),
    dict_of({"weight": tensor(), "n": call(name("builtins", "list"), b"(" * 10 + b"t" * 10)}),
    # A list and a dictionary that contain themselves, a tuple nested a hundred thousand times, also as a key.
    dict_of({"weight": tensor(), "n": b"]q\x09h\x09a", "d": b"}q\x08" + text("d") + b"h\x08s"}),
    dict_of({"weight": tensor(), "n": b")" + b"\x85" * 100_000}),
    b"}" + b")" + b"\x85" * 100_000 + b"Ns" + text("weight") + tensor() + b"s",
    # A place in the memo for which Python's unpickler would make room first.
    dict_of({"weight": tensor() + b"r\xff\xff\xff\xff"}),
  ],
)
def test_tricks_that_change_nothing(write, body):
  assert_same(read_torch_file(write(body)), EXPECTED)


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (dict_of({"w": tensor(offset=1)}), r"w of shape \(2, 3\) does not fit in its storage of 6 entries"),
    (dict_of({"w": tensor(offset=-1)}), "w has no sensible shape, strides or offset"),
    (dict_of({"w": tensor(strides=(-3, 1))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(-2, 3))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(True, 3))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(2.0, 3))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(2, 3, 1))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(2**100, 3))}), "w has no sensible shape"),
    (dict_of({"w": tensor(shape=(1,) * 40, strides=(1,) * 40)}), "w has no sensible shape"),
    (dict_of({"w": tensor(strides=(2**47, 1))}), "does not fit in its storage"),
    (dict_of({"w": tensor(shape=(2**40, 2**40), strides=(0, 0))}), "does not fit in its storage"),
    (dict_of({"w": tensor(shape=(2**47, 0, 2**47), strides=(0, 0, 0))}), "truncated or damaged"),
    (dict_of({"w": tensor(storage(size=2**40), shape=(2**40,), strides=(1,))}), r"has 24 bytes|should end at byte"),
    (dict_of({"w": tensor(storage(size=7))}), "the storage of w has 24 bytes, not 7 entries float32"),
    (dict_of({"w": tensor(storage(kind="DoubleStorage"))}), "the storage of w has 24 bytes|should end at byte"),
    (dict_of({"w": tensor(), "v": tensor(storage(kind="ByteStorage", size=24))}), "describes one storage in two ways"),
    (dict_of({"w": tensor(storage("../../0"))}), "no item named|lists a storage that no tensor has"),
    (dict_of({"w": tensor(text("no storage"))}), "w has no sensible shape|lists a storage that no tensor has"),
    (dict_of({"w": tensor(tuple_of("module", "a", "b", "c", "d") + b"Q")}), "a storage of a kind"),
    (dict_of({"w": tensor(tuple_of("storage", "a", "b", "c", "d") + b"Q")}), "its pickle makes no sense"),
    (dict_of({"w": tensor(b"N" + b"Q")}), "its pickle makes no sense"),
    (call(text("os.system"), "ls"), "its pickle calls what is no function"),
    (name("collections", "OrderedDict") + b"NR", "its pickle calls what is no function"),
    (call(name("collections", "OrderedDict"), 3), "its pickle makes no sense"),
    (b"K\x01K\x02\x93", "a global without a name"),
    (b"]Na" + text("a") + b"Ns", "sets entries of what is no dictionary"),
    (b"}Na", "appends to what is no list"),
    (b"}(Nu", "truncated or damaged"),
    (b"h\x09", r"its pickle makes no sense \(KeyError\)"),
    (b"0", r"its pickle makes no sense \(IndexError\)"),
    (b"\x82\x01", "the opcode EXT1, which torch.save does not write"),
    (b"Pid\n", "the opcode PERSID"),
    # Lengths that are not there.
    (b"\x8d" + struct.pack("<Q", 2**60), "truncated or damaged"),
    (b"\x8e" + struct.pack("<Q", 2**40) + b"x", "truncated or damaged"),
    (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x", "truncated or damaged"),
    (b"I" + b"9" * 100_000 + b"\n", "truncated or damaged"),
  ],
)
def test_bogus_descriptions_are_refused_before_anything_is_allocated(write, body, message):
  path = write(body)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match=message) as info:
      read_torch_file(path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
  finally:
    tracemalloc.stop()
  assert "\n" not in str(info.value) and len(str(info.value)) < 500


def test_a_pickle_without_end_is_refused(write, monkeypatch):
  monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
  assert_same(read_torch_file(write(STATE)), EXPECTED)
  with pytest.raises(InputError, match="more than 1000 opcodes"):
    read_torch_file(write(b"}" * 1000))


# ----------------------------------------------------------------------------------------------------------------------
# Archives and damage
# ----------------------------------------------------------------------------------------------------------------------


def test_a_compressed_archive_is_refused(tmp_path):
  zeros = {"0": np.zeros(10_000_000, np.float32)}
  path = write_zip(tmp_path / "bomb.pth", STATE, zeros, compression=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 100_000
  with pytest.raises(InputError, match=r"bomb\.pth is truncated or damaged \(an entry of the archive is compressed"):
    read_torch_file(path)


def test_entries_that_claim_more_than_the_file_are_refused(tmp_path):
  """All entries of the directory are led to the same bytes, or claim to be long."""
  path = write_zip(tmp_path / "weights.pth", STATE, {str(i): np.zeros(1000, np.float32) for i in range(3)})
  with zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
  whole = path.read_bytes()
  for size in (2**31, 6000):
    content = bytearray(whole)
    position = content.index(b"PK\x01\x02")
    for info in infos:
      struct.pack_into("<II", content, position + 20, size, size)
      position += 46 + len(info.filename)
    path.write_bytes(content)
    with pytest.raises(InputError, match="claim to be longer than the file"):
      read_torch_file(path)


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ({}, r"is no file of torch\.save \(it begins with"),
    ({"archive/other": b"x"}, "has 0 entries data.pkl"),
    ({"a/data.pkl": b"x", "b/data.pkl": b"x"}, "has 2 entries data.pkl"),
    ({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"middle"}, "byteorder is neither little nor big"),
    ({"a/data.pkl": b"\x80\x02" + STATE + b"."}, r"no item named 'a/data/0' in the archive"),
    ({"a/data.pkl": b"\x80\x02" + STATE}, "pickle exhausted before seeing STOP"),
  ],
)
def test_archives_that_torch_did_not_write(tmp_path, entries, message):
  path = tmp_path / "weights.pth"
  with zipfile.ZipFile(path, "w") as archive:
    for entry, content in entries.items():
      archive.writestr(entry, content)
  with pytest.raises(InputError, match=message):
    read_torch_file(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", r"is no file of torch\.save \(it is empty\)"),
    (b"<!DOCTYPE html>", r"is no file of torch\.save \(it begins with b'<!DOCTYP'\)"),
    (pickle.dumps({"a": 1}), r"is no file of torch\.save"),
    (pickle.dumps(MAGIC, 2), "truncated or damaged"),
    (b"".join(pickle.dumps(v, 2) for v in (MAGIC, 1002, {}, {}, [])), "its header is not that of torch.save"),
    (b"".join(pickle.dumps(v, 2) for v in (MAGIC, 1001, {}, {}, {})), "its header is not that of torch.save"),
  ],
)
def test_other_files_are_named(tmp_path, content, message):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    read_torch_file(path)


def test_missing_files_and_directories_are_named(tmp_path):
  with pytest.raises(InputError, match=r"lost\.pth is missing"):
    read_torch_file(tmp_path / "lost.pth")
  with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
    read_torch_file(tmp_path)


def test_truncated_files_are_named(write):
  path = write(STATE)
  content = path.read_bytes()
  for length in range(len(content)):
    path.write_bytes(content[:length])
    with pytest.raises(InputError, match=r"weights\.pth (is truncated or damaged|is no file of torch\.save)"):
      read_torch_file(path)


def test_a_storage_that_counts_wrongly_is_named(tmp_path):
  path = write_legacy(tmp_path / "weights.pth", STATE)
  content = path.read_bytes()
  for count in (5, 7, -1, 2**62, -(2**63)):
    path.write_bytes(content[:-32] + struct.pack("<q", count) + content[-24:])
    with pytest.raises(InputError, match="truncated or damaged"):
      read_torch_file(path)


def test_random_damage_raises_no_other_error(write):
  path = write(dict_of({"epoch": 1, "model": dict_of({"weight": tensor(), "b": tensor(shape=(3,), strides=(2,))})}))
  content, rng = path.read_bytes(), random.Random(0)
  refused = 0
  for _ in range(600):
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)
    try:
      read_torch_file(path)
    except InputError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 200


# ----------------------------------------------------------------------------------------------------------------------
# Against PyTorch
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_pytorch(tmp_path, zipped, protocol):
  torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  base = torch.arange(24.0).reshape(4, 6)
  state = module.state_dict()
  state |= {"view": base[1:, ::2], "transposed": base.T, "half": base.half(), "bfloat16": base.bfloat16()[2:]}
  state |= {"parameter": torch.nn.Parameter(base.double()), "empty": torch.zeros(0, 3), "integers": torch.arange(3)}
  state |= {"channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
  optimizer = torch.optim.Adam(module.parameters())
  scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
  checkpoint = {"model": state, "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
  checkpoint |= {
    "epoch": 3,
    "rng": torch.get_rng_state(),
    "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
  }
  path = tmp_path / "weights.pth"
  torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
  got = read_torch_file(path)
  assert list(got) == list(state)
  for key, want in state.items():
    assert str(want.dtype) == f"torch.{got[key].dtype.name}"
    np.testing.assert_array_equal(got[key].astype(np.float64), want.detach().double().numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_refused(tmp_path, zipped):
  torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
  path = tmp_path / "model.pth"
  torch.save(torch.nn.Linear(2, 3), path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(
    InputError, match=r"contains torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict\(\)"
  ):
    read_torch_file(path)


def test_the_opcodes_that_are_known_exist():
  known = {opcode.name for opcode in pickletools.opcodes}
  assert torch_pickle._PUSHES | torch_pickle._MAKES.keys() | torch_pickle._ACTIONS.keys() <= known
