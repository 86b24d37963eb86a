"""Random damage to files, the same for the same seed."""

from __future__ import annotations

import pathlib
import random


def damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
  """Returns what was done to a file, and what it is then: never the same."""
  place, size = rng.randrange(len(content) + 1), int(2 ** rng.uniform(0, 9))
  before, hit, after = content[:place], content[place : place + size], content[place + size :]
  ways = {
    "flipped": before + bytes(byte ^ 1 << rng.randrange(8) for byte in hit[:1]) + content[place + 1 :],
    "cut": before,
    "cut, with an end marker of JPEG": before + b"\xff\xd9",
    "zeros": before + bytes(len(hit)) + after,
    "noise": before + rng.randbytes(len(hit)) + after,
    "left out": before + after,
    "put in": before + rng.randbytes(size) + content[place:],
    "twice": before + hit + hit + after,
  }
  what, changed = rng.choice(list(ways.items()))
  return (what, changed) if changed != content else ("a byte more", content + b"\0")


def damage_a_file(folder: pathlib.Path, rng: random.Random) -> str:
  """Damages or removes one of the files in `folder`; returns which, and how."""
  file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
  if rng.random() < 0.1:
    file.unlink()
    return f"{file} removed"
  what, content = damage(file.read_bytes(), rng)
  file.write_bytes(content)
  return f"{file} {what}"
