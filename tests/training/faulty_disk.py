"""Runs on a disk that fails: each file operation of a short run fails once, or is the last one before a kill.

    PYTHONPATH=. python tests/training/faulty_disk.py [--cases N] [--damage N] [--seed N]

After each failure the run must have finished or ended with one line, have called no good checkpoint damaged, and the
same call must end as if nothing had happened, bit for bit, with nothing left over. Without `--cases` every operation
is tried, with an errno drawn at random, which takes an hour. `--damage` tries bytes of files that are wrong: the run
must notice, or end the same; where it refuses the file, that file put back is all it takes. Exits with 1 if a case
fails, and says which.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ERRNOS = [
  *(errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EFBIG, errno.EINTR, errno.EINVAL, errno.EIO, errno.EISDIR),
  *(errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENODEV, errno.ENOENT, errno.ENOLCK),
  *(errno.ENOMEM, errno.ENOSPC, errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT),
]
FOREVER = 2**31 - 1
SHORT = {"train__epochs": 2, "train__decay_epochs": (1,), "finetune__epochs": 1, "finetune__decay_epochs": ()}


def build_library(folder: pathlib.Path) -> pathlib.Path:
  """Compiles `faulty_disk.c`; raises `FileNotFoundError` if there is no compiler."""
  library = folder / "faulty_disk.so"
  source = pathlib.Path(__file__).with_suffix(".c")
  subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
  return library


class FaultyDisk:
  """The preloaded library, which watches one folder."""

  def __init__(self, folder: pathlib.Path):
    self._library, self._folder = ctypes.CDLL(None), os.fsencode(folder)
    self._library.disk_failed.restype = ctypes.c_char_p

  @contextlib.contextmanager
  def failing(self, first: int, last: int, number: int) -> Iterator[None]:
    """Within the block, operations `first` to `last` on the folder fail with the errno `number`."""
    self._library.disk_watch(self._folder, first, last, number)
    try:
      yield
    finally:
      self._library.disk_watch(b"", 0, -1, 0)

  def operations(self) -> int:
    """Counts the operations since the block began; to be called in it."""
    return self._library.disk_operations()

  def failed(self) -> str:
    """Returns the first operation that failed."""
    return os.fsdecode(self._library.disk_failed())


@contextlib.contextmanager
def output_to(file: pathlib.Path) -> Iterator[None]:
  """Sends all that is printed, by libraries too, to a file."""
  sys.stdout.flush(), sys.stderr.flush()
  saved = os.dup(1), os.dup(2)
  with file.open("wb") as output:
    for number in (1, 2):
      os.dup2(output.fileno(), number)
  try:
    yield
  finally:
    sys.stdout.flush(), sys.stderr.flush()
    for number, copy in zip((1, 2), saved, strict=True):
      os.dup2(copy, number)
      os.close(copy)


class Cases:
  """A short run, places at which it begins, and what must hold after a failure."""

  def __init__(self, folder: pathlib.Path):
    from small_run import small_config

    from sapr_jax import training

    self._config, self._run = small_config(**SHORT), training.run
    self._whole, self._workdir, self._output = folder / "whole", folder / "run", folder / "output.txt"
    self.disk = FaultyDisk(self._workdir)
    with output_to(self._output):
      self._run(self._config, self._whole)
    # Places to begin at: nothing, a checkpoint in each stage, results that are not yet written, a finished run.
    self.begins = {"new": None, "resumed": folder / "resumed", "fine-tuned": folder / "tuned", "finished": self._whole}
    shutil.copytree(self._whole, folder / "tuned")
    for name in ("summary.json", "report.txt"):
      (folder / "tuned" / name).unlink()
    shutil.copytree(folder / "tuned", folder / "resumed")
    for name in ("dense", "pruned", "checkpoints/finetune"):
      shutil.rmtree(folder / "resumed" / name)
    checkpoints = (folder / "resumed" / "checkpoints" / "train").iterdir()
    shutil.rmtree(max(checkpoints, key=lambda path: int(path.name)))

  def count(self, begin: str) -> int:
    """Counts the operations of an undisturbed run."""
    self._begin(begin)
    with self.disk.failing(0, -1, 0), output_to(self._output):
      self._run(self._config, self._workdir)
      return self.disk.operations()

  def fail(self, begin: str, first: int, last: int, number: int) -> str:
    """Lets a run fail and go on; returns the operation, and raises `AssertionError` if something is wrong."""
    from small_run import check_same_run

    from sapr_jax.errors import InputError

    self._begin(begin)
    problem: Exception | None = None
    with self.disk.failing(first, last, number), output_to(self._output):
      try:
        self._run(self._config, self._workdir)
      except Exception as error:
        problem = None if isinstance(error, InputError) and "\n" not in str(error) else error
      failed = self.disk.failed()
    try:
      if problem is not None:
        raise problem
      self._check_output()
      with output_to(self._output):
        self._run(self._config, self._workdir)
      self._check_output()
      check_same_run(self._workdir, self._whole)
      left = [path for path in self._workdir.rglob("*") if ".tmp-" in path.name or "-tmp" in path.name]
      assert not left, f"left over: {left}"
      assert not (self._workdir / "checkpoints" / "damaged").exists(), "a good checkpoint was called damaged"
    except Exception as error:
      raise AssertionError(f"{failed}: {type(error).__name__}: {error}") from error
    return failed

  def damage(self, begin: str, rng: random.Random) -> str:
    """Damages a file of a work directory; returns which, and raises `AssertionError` if a run then goes wrong."""
    from damage import damage_a_file
    from small_run import check_same_run

    from sapr_jax.errors import InputError

    self._begin(begin)
    before = {file: file.read_bytes() for file in self._workdir.rglob("*") if file.is_file()}
    what = damage_a_file(self._workdir, rng)
    try:
      with output_to(self._output):
        try:
          self._run(self._config, self._workdir)
        except InputError as error:
          assert "\n" not in str(error), f"more than a line: {error}"
          for file, content in before.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
          self._run(self._config, self._workdir)
      self._check_output()
      if "records.jsonl" in self._output.read_text():  # which names what was lost
        shutil.copy(self._whole / "records.jsonl", self._workdir)
      if begin != "finished":  # of which nothing is read but the summary
        check_same_run(self._workdir, self._whole)
    except Exception as error:
      raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return what

  def _begin(self, begin: str) -> None:
    shutil.rmtree(self._workdir, ignore_errors=True)
    if (template := self.begins[begin]) is not None:
      shutil.copytree(template, self._workdir)

  def _check_output(self) -> None:
    text = self._output.read_text(errors="replace")
    for sign in ("Traceback", "Exception ignored", "ERROR", "Error:"):
      assert sign not in text, f"printed: {text}"


def draw(counts: dict[str, int], cases: int | None, seed: int) -> list[tuple[str, int, int, int]]:
  """Returns (where the run begins, first and last operation that fails, errno): every operation, or some of them."""
  rng = random.Random(seed)
  places = [(begin, n) for begin, count in counts.items() for n in range(1, count + 1)]
  if cases is not None:
    places = rng.sample(places, min(cases, len(places)))
  # Half of them are kills: nothing from there on reaches the disk.
  kinds = [(n, FOREVER, errno.EIO) if rng.random() < 0.5 else (n, n, rng.choice(ERRNOS)) for _, n in places]
  return [(begin, *kind) for (begin, _), kind in zip(places, kinds, strict=True)]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", type=int, help="how many operations to try; unset: all")
  parser.add_argument("--damage", type=int, default=0, help="how many damaged files to try")
  parser.add_argument("--seed", type=int, default=0, help="of the operations, their errnos and the damage")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    if not hasattr(ctypes.CDLL(None), "disk_watch"):
      environment = {**os.environ, "LD_PRELOAD": str(build_library(pathlib.Path(folder)))}
      environment |= {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")}
      environment |= {"PYTHONPATH": os.pathsep.join([*sys.path, str(pathlib.Path(__file__).parent.parent)])}
      environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
      return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    cases, started = Cases(pathlib.Path(folder)), time.monotonic()
    counts = {begin: cases.count(begin) for begin in cases.begins}
    todo = draw(counts, args.cases, args.seed)
    print(f"file operations: {counts}; {len(todo)} cases, {args.damage} damaged files", flush=True)
    results = []
    for begin, first, last, code in todo:
      kind = f"{errno.errorcode[code]}{' from there on' if last == FOREVER else ''}"
      results.append(attempt(f"{begin} {first} {kind}", functools.partial(cases.fail, begin, first, last, code)))
    rng = random.Random(args.seed)
    for _ in range(args.damage):
      begin = rng.choice(["resumed", "fine-tuned", "finished"])
      results.append(attempt(f"{begin} damage", functools.partial(cases.damage, begin, rng)))
    passed, seconds = sum(results), time.monotonic() - started
    print(f"{passed} passed, {len(results) - passed} failed, in {seconds:.0f} s")
  return 0 if all(results) else 1


def attempt(name: str, case: Callable[[], str]) -> bool:
  """Prints a case, and returns whether it passed."""
  try:
    print(f"{name}: {case()}: ok", flush=True)
  except AssertionError as error:
    print(f"{name}: FAILED: {error}", flush=True)
    return False
  return True


if __name__ == "__main__":
  sys.exit(main())
