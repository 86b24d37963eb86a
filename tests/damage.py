"""Random damage to files, the same for the same seed."""

from __future__ import annotations

import pathlib
import random


def damage(content: bytes, rng: random.Random) -> bytes:
  """Returns content that was cut, extended, or changed in some bytes; never the same."""
  place, length = rng.randrange(len(content) + 1), rng.randrange(1, 20)
  changed = rng.choice(
    [
      content[:place],
      content[:place] + rng.randbytes(length) + content[place:],
      content[:place] + bytes(length) + content[place + length :],
      content[:place] + content[place + length :],
      b"",
      content + content[:length],
      content[:place]
      + bytes(byte ^ 1 << rng.randrange(8) for byte in content[place : place + 1])
      + content[place + 1 :],
    ]
  )
  return changed if changed != content else content + b"\0"


def damage_a_file(folder: pathlib.Path, rng: random.Random) -> str:
  """Damages or removes one of the files in `folder`; returns which, and how large it is now."""
  file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
  if rng.random() < 0.1:
    file.unlink()
    return f"{file} removed"
  file.write_bytes(damage(file.read_bytes(), rng))
  return f"{file} of {file.stat().st_size} bytes"
