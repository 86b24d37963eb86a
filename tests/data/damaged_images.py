"""Image files damaged at random: each decodes with all of its pixels, or is refused in one line, and soon.

PYTHONPATH=.:tests python tests/data/damaged_images.py [--cases N] [--seed N]
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import simplejpeg
from damage import damage
from PIL import Image

from sapr_jax.data.decoding import decode_exactly, decode_quickly, image_size
from sapr_jax.errors import InputError

SECONDS = 10  # more than the largest image that is accepted takes
# libjpeg's words for pixels that it made up. Flipped bits may as well give others, which nothing tells.
LOST = ("premature end", "Premature end", "bad Huffman code", "instead of RST")


def whole_files() -> list[bytes]:
  """Returns JPEG and PNG files of every kind."""
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8))
  photo = noise.resize((70, 50), Image.Resampling.BICUBIC)
  options = [
    *({"format": "jpeg"} | more for more in ({}, {"optimize": True}, {"progressive": True}, {"subsampling": 0})),
    *({"format": "jpeg"} | more for more in ({"restart_marker_rows": 1}, {"quality": 95}, {"quality": 20})),
    *({"format": "jpeg", "mode": mode} for mode in ("L", "CMYK")),
    *({"format": "png", "mode": mode} for mode in ("RGB", "L", "P", "RGBA", "1")),
    {"format": "png", "compress_level": 0},
  ]
  files = []
  for option in options:
    buffer = io.BytesIO()
    photo.convert(option.pop("mode", "RGB")).save(buffer, **option)
    files.append(buffer.getvalue())
  return files


def outcome(encoded: bytes, rng: random.Random) -> str:
  """Returns what became of a file; raises `AssertionError` if that is not as it must be."""
  started, answers = time.monotonic(), set()
  readers = (
    lambda: image_size(encoded, "file"),
    lambda: decode_exactly(encoded, "file"),
    lambda: decode_quickly(encoded, "file", rng.choice((1, 2, 8))),
  )
  for read in readers:
    try:
      read()
      answers.add("accepted")
    except InputError as error:
      assert "\n" not in str(error) and "'file'" in str(error), error
      answers.add("refused")
    if read is readers[0]:
      answers.clear()  # a header may be whole where its image is not
  assert len(answers) == 1, "refused by one of the decoders only"
  assert time.monotonic() - started < SECONDS, "it took too long"
  if answers == {"accepted"} and encoded[:2] == b"\xff\xd8":
    try:
      simplejpeg.decode_jpeg(encoded)
    except ValueError as error:
      assert not any(words in str(error) for words in LOST), error
  return answers.pop()


def failures(cases: int, seed: int, outcomes: Counter[tuple[str, str]]) -> Iterator[str]:
  """Damages so many files; counts what became of them, and yields a line for each that is not as it must be."""
  files = whole_files()
  for case in range(cases):
    rng = random.Random(f"{seed} {case}")
    number = rng.randrange(len(files))
    encoded, done = files[number], []
    for _ in range(rng.choice((1, 1, 2))):
      what, encoded = damage(encoded, rng)
      done.append(what)
    try:
      outcomes[" and ".join(done), outcome(encoded, rng)] += 1
    except Exception as error:
      yield f"case {case} of seed {seed}, file {number}, {' and '.join(done)}: {type(error).__name__}: {error}"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cases", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  warnings.simplefilter("ignore")  # of Pillow
  outcomes: Counter[tuple[str, str]] = Counter()
  failed = list(failures(args.cases, args.seed, outcomes))
  for (what, became), count in sorted(outcomes.items()):
    print(f"{count:6} {became} {what}")
  print("\n".join(failed) or "all as they must be")
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main())
