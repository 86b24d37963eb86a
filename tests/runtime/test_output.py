"""Output that nobody reads."""

import subprocess
import sys

import pytest

from sapr_jax.runtime import say

PROGRAM = """
import os, sys
from sapr_jax.runtime.output import survive_lost_output

survive_lost_output()
with open(sys.argv[1], "w") as file:
  for number in range(3):
    print("a line", "\\udcff", flush=True)
    print("a line", file=sys.stderr)
    os.write(2, b"a line of C++")
    file.write(f"{number}")
  assert file.fileno() > 2
"""


@pytest.mark.parametrize(
  "streams",
  [
    ">&-",
    "2>&-",
    "<&- >&- 2>&-",
    ">/dev/full",
    "2>/dev/full",
    ">/dev/full 2>&1",
    "</dev/null >&0",
    "| true",
    "2>&1 | true",
  ],
)
def test_a_program_goes_on_when_its_output_is_lost(streams, tmp_path):
  command = ["bash", "-c", f'set -o pipefail; "$@" {streams}', "bash", sys.executable, "-c", PROGRAM, tmp_path / "file"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
  assert (tmp_path / "file").read_text() == "012"


def test_output_that_is_read_is_as_ever(tmp_path):
  done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "file"], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "a line \\udcff\n" * 3)
  assert done.stderr == "a line\na line of C++" * 3


def test_a_library_goes_on_too_and_leaves_the_output_as_it_is(monkeypatch):
  with open("/dev/full", "w") as full, monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", full)
    say("a line")
    assert sys.stdout is full
    with pytest.raises(OSError, match="No space left"):
      full.close()
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", full)
    say("a line after it was closed")
