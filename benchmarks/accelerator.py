"""Everything there is to measure on an accelerator, in pieces that a machine does which one has for minutes at a time.

    python -m benchmarks.accelerator --out DIR [--minutes 9] [--only PIECE ...]
    python -m benchmarks.accelerator --out DIR --tiny

Each piece is a process of its own with a limit of time. How it ended is in `DIR/accelerator_<platform>.json` at once,
what it measured in `DIR/<benchmark>_<platform>.json`, and what it said in `DIR/accelerator_<platform>.log`. The same
command, here or on another machine with such a device, goes on with what is not done: pieces that were never tried
come first, then those that failed or were cut short. With `--out results` the page on performance shows what was
measured (`python -m benchmarks.performance_page`). `--tiny` rehearses all of it in a minute or two, on a CPU too.

Exit status: 0 if all is done; 75 if pieces are left, and the same command goes on, or were cut short, and more minutes
help; 1 if none is, and some failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import MISSED, NOTE, kind, table
from benchmarks.performance_page import section
from sapr_jax.artifacts.files import read_json, remove_temporaries, write_json
from sapr_jax.errors import InputError, os_errors_in_one_line
from sapr_jax.runtime.compilation_cache import cache_folder

DONE, FAILED, OUT_OF_TIME, LEFT_OUT, CUT_SHORT = "done", "failed", "out of time", "left out", "cut short"
OUTCOMES = (DONE, FAILED, OUT_OF_TIME, LEFT_OUT, CUT_SHORT)
GO_ON = 75


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a benchmark that is measured in a process of its own.

  Attributes:
    benchmark: Module in `benchmarks`.
    row: Its row.
    minutes: The most that it may take.
    packages: Modules that it needs and would miss late.
    tiny: Whether `--tiny` has it: rows that differ only in their sizes are rehearsed once.
  """

  benchmark: str
  row: str
  minutes: float = 8
  packages: tuple[str, ...] = ()
  tiny: bool = False

  @property
  def name(self) -> str:
    return f"{self.benchmark}/{self.row}"

  def command(self, out: pathlib.Path, tiny: bool) -> list[str]:
    quick = ["--quick"] if tiny else []
    return [sys.executable, "-m", f"benchmarks.{self.benchmark}", self.row, "--results", str(out), *quick]


PIECES = (
  Piece("agreement", "resnet8", tiny=True),
  Piece("training_step", "resnet56-float32", tiny=True),
  Piece("training_step", "resnet50-bfloat16"),
  Piece("device_time", "resnet50", packages=("grain", "cv2"), tiny=True),
  Piece("device_time", "resnet56", tiny=True),
  Piece("pruned_speed", "resnet50"),
  Piece("training_step", "mobilenetv2-bfloat16"),
  Piece("pruned_speed", "resnet56", tiny=True),
  Piece("latency_budget", "resnet56_1024", tiny=True),
  Piece("method_cost", "resnet56", tiny=True),
  Piece("training_step", "resnet56-bfloat16"),
  Piece("agreement", "mobilenetv2_cifar"),
  Piece("pruned_speed", "mobilenetv2"),
  Piece("method_cost", "resnet50"),
  Piece("latency_budget", "resnet56_32"),
)
"""In order of worth."""


def main(pieces: Sequence[Piece] = PIECES) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for what is measured")
  parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take (default: %(default)g)")
  parser.add_argument(
    "--only", nargs="+", metavar="PIECE", help="these pieces, done or not; `agreement` names all of its"
  )
  parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try it; not into results/")
  args = parser.parse_args()
  if not 0 < args.minutes < math.inf:
    parser.error(f"--minutes must be a positive number, got {args.minutes:g}")
  end = time.monotonic() + 60 * args.minutes
  named = {p.name for p in pieces} | {p.benchmark for p in pieces}
  if unknown := set(args.only or ()) - named:
    parser.error(f"PIECE must be one of {', '.join(p.name for p in pieces)}, got {', '.join(sorted(unknown))}")
  if args.tiny and args.out.resolve() == pathlib.Path("results").resolve():
    parser.error("--tiny measures nothing that is worth a place in results/; name another folder")
  about = find_machine()
  if about["platform"] == "cpu" and not args.tiny:
    sys.exit("error: JAX finds no accelerator here, only a CPU; --tiny rehearses on one")
  if args.tiny:
    print("A rehearsal: a tiny network stands for each, so that the figures and goals below mean nothing.")
  chosen = [p for p in pieces if not (args.tiny and not p.tiny)]
  if args.only:
    chosen = [p for p in chosen if {p.name, p.benchmark} & set(args.only)]
  stopped = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.set())
  try:
    with os_errors_in_one_line(args.out):
      args.out.mkdir(parents=True, exist_ok=True)
      record = Record(args.out, about, args.tiny)
      status = measure(chosen, record, end, stopped, again=bool(args.only))
      print(f"\n{record.table(chosen)}", flush=True)
      if goals := record.goals():
        print(f"\n{goals}", flush=True)
  except InputError as error:
    sys.exit(f"error: {error}")
  return status


def find_machine() -> dict[str, Any]:
  """Returns `measuring.machine()`, asked in another process: this one keeps off the device."""
  code = "import json; from benchmarks.measuring import machine; print(json.dumps(machine()))"
  try:
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
  except subprocess.TimeoutExpired:
    sys.exit("error: JAX does not find its devices within three minutes")
  if answer.returncode:
    sys.exit(f"error: JAX does not start: {last_error(answer.stderr)}")
  return json.loads(answer.stdout.splitlines()[-1])


class Record:
  """How the pieces ended on devices of one kind: a file that is renewed after each.

  Attributes:
    out: The folder.
    outcomes: Name of a piece -> "outcome", "seconds", "tries", and "why" or "notes".
  """

  def __init__(self, out: pathlib.Path, about: Mapping[str, Any], tiny: bool):
    self.out, self.tiny, self._about = out, tiny, about
    self._file = out / f"accelerator_{about['platform']}.json"
    self.log = self._file.with_suffix(".log")
    earlier: Any = {"machine": about, "tiny": tiny, "outcomes": {}}
    if os.path.lexists(self._file) and not _is_record(earlier := read_json(self._file)):
      sys.exit(f"error: {self._file} is damaged or of something else; move it away, or give another --out")
    remove_temporaries(out)
    before, now = {**earlier["machine"], "tiny": earlier["tiny"]}, {**kind(about), "tiny": tiny}
    if differing := [field for field in now if now[field] != before.get(field)]:
      shown = "; ".join(f"{field} {before.get(field)}, here {now[field]}" for field in differing)
      sys.exit(f"error: {self._file} was begun with {shown}; give another --out, so that nothing is mixed")
    self.outcomes: dict[str, dict[str, Any]] = earlier["outcomes"]

  def add(self, piece: Piece, outcome: str, **more: Any) -> None:
    """Writes how a piece ended."""
    tries = self.outcomes.get(piece.name, {}).get("tries", 0) + (outcome != LEFT_OUT)
    self.outcomes[piece.name] = {"outcome": outcome, "tries": tries, **{k: v for k, v in more.items() if v}}
    write_json(self._file, {"machine": self._about, "tiny": self.tiny, "outcomes": self.outcomes})
    print(f"{piece.name}: {self._in_words(piece)}", flush=True)

  def is_done(self, piece: Piece) -> bool:
    return self.outcomes.get(piece.name, {}).get("outcome") == DONE

  def tries(self, piece: Piece) -> int:
    return self.outcomes.get(piece.name, {}).get("tries", 0)

  def table(self, pieces: Sequence[Piece]) -> str:
    """Returns a table of how the pieces ended."""
    return table(["piece", "outcome"], [[piece.name, self._in_words(piece)] for piece in pieces])

  def goals(self) -> str:
    """Returns the lines on goals of all that was measured."""
    benchmarks = dict.fromkeys(name.split("/")[0] for name, found in self.outcomes.items() if found["outcome"] == DONE)
    lines = [line for name in benchmarks for line in section(name, self.out, (self._about["platform"],)).split("\n")]
    return "\n".join(line for line in lines if line.startswith((MISSED, "- Goal reached")))

  def _in_words(self, piece: Piece) -> str:
    found = self.outcomes.get(piece.name)
    if found is None:
      return "not tried yet"
    took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
    return f"{found['outcome']}{took}" + "".join(f"; {text}" for text in found.get("notes", ()))


def _is_record(found: Any) -> bool:
  """Returns whether this is what `Record` writes."""

  def is_outcome(entry: Any) -> bool:
    match entry:
      case {"outcome": outcome, "tries": int()}:
        notes, seconds = entry.get("notes", []), entry.get("seconds", 0)
        return outcome in OUTCOMES and isinstance(notes, list) and isinstance(seconds, (int, float))
    return False

  match found:
    case {"machine": dict(), "tiny": bool(), "outcomes": dict(outcomes)}:
      return all(map(is_outcome, outcomes.values()))
  return False


def measure(pieces: Sequence[Piece], record: Record, end: float, stopped: threading.Event, *, again: bool) -> int:
  """Measures pieces, those that are done too if `again`, until `end` or a signal; returns the exit status."""
  first = True
  for piece in sorted(pieces, key=record.tries):  # which keeps their order otherwise
    if stopped.is_set():
      break
    if record.is_done(piece) and not again:
      continue
    if missing := [name for name in piece.packages if importlib.util.find_spec(name) is None]:
      record.add(piece, LEFT_OUT, notes=[f"{' and '.join(missing)} missing"])
      continue
    start = time.monotonic()
    limit = min(60 * piece.minutes, end - start)
    if limit < (0 if first else 0.2 * 60 * piece.minutes):  # too little to get anywhere
      continue
    print(f"{piece.name}: for at most {limit:.0f} s", flush=True)
    ended, text = run(piece, record, limit, stopped)
    seconds = time.monotonic() - start
    notes = [line.removeprefix(NOTE) for line in text.splitlines() if line.startswith(NOTE)]
    if ended is None and stopped.is_set():
      break
    if ended is None:
      if limit == 60 * piece.minutes:
        record.add(piece, OUT_OF_TIME, seconds=seconds, notes=notes)
      elif first:
        needed = f"it may take {piece.minutes:.2g} minutes: give more --minutes"
        record.add(piece, CUT_SHORT, seconds=seconds, notes=[needed, *notes])
      else:  # had it been first, there would have been more time: the next call begins with it
        print(f"{piece.name}: cut short", flush=True)
    elif ended == 0:
      record.add(piece, DONE, seconds=seconds, notes=notes)
    elif missing := _MISSING.findall(text):
      record.add(piece, LEFT_OUT, notes=[f"{missing[-1]} missing"])
    else:
      record.add(piece, FAILED, seconds=seconds, notes=[last_error(text, ended), *notes])
    first = False
  if stopped.is_set():
    print("stopped by a signal; the same command goes on", flush=True)
    return GO_ON
  outcomes = [record.outcomes.get(piece.name, {}).get("outcome") for piece in pieces]
  if None in outcomes or CUT_SHORT in outcomes:
    return GO_ON
  return int(any(outcome in (FAILED, OUT_OF_TIME) for outcome in outcomes))


def run(piece: Piece, record: Record, limit: float, stopped: threading.Event) -> tuple[int | None, str]:
  """Runs a piece for at most `limit` seconds; returns its exit status, None if it did not end, and what it said."""
  environment = {
    # A second try, and rows of one network, find the programs of the first.
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_TRACEBACK_FILTERING": "off",
    **os.environ,
  }
  with record.log.open("a+") as log:
    print(f"\n== {piece.name}", file=log, flush=True)
    begin = log.tell()
    command = piece.command(record.out, record.tiny)
    process = subprocess.Popen(
      command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent
    )
    status, end = None, time.monotonic() + limit
    while status is None and (left := end - time.monotonic()) > 0 and not stopped.is_set():
      with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(min(left, 0.2))
    end_group(process)
    log.seek(begin)
    text = log.read()
  print("".join(f"{line}\n" for line in text.splitlines() if line.startswith("|")), end="", flush=True)
  return status, text


def _end_with_parent() -> None:
  """Lets a new process end when this one is killed, where the system can: it would keep the device busy."""
  if sys.platform == "linux":
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def end_group(process: subprocess.Popen) -> None:
  """Ends what is left of a process and of those that it started."""
  for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(patience)


_MISSING = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'", re.MULTILINE)
_ERROR = re.compile(r"^(?:error: |(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b)")


def last_error(text: str, status: int = 1) -> str:
  """Returns what ended a program: a signal, the last line of its output that names an error, or its last line."""
  if status < 0:
    return f"ended by {signal.Signals(-status).name}"
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  named = [line for line in lines if _ERROR.match(line)]
  return (named or lines or ["it said nothing"])[-1][:300]


if __name__ == "__main__":
  sys.exit(main())
