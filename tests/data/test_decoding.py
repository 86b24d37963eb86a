"""Image files of every kind, whole and broken, against Pillow."""

import io
import re

import numpy as np
import pytest
import simplejpeg

from sapr_jax.data.decoding import BrokenImageError, decode_exactly, decode_quickly, image_size

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def make_image(height=40, width=60):
  """A smooth image, as JPEG stores such ones nearly unchanged."""
  rows, columns = np.mgrid[:height, :width]
  channels = [rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)]
  return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image, file_format, **options):
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def test_a_jpeg_is_decoded_close_to_pillow_and_pillow_decodes_it_exactly():
  encoded = encode(make_image(), "jpeg")
  expected = np.asarray(Image.open(io.BytesIO(encoded)))
  assert image_size(encoded, "a") == (40, 60)
  quick = decode_quickly(encoded, "a")
  assert (quick.shape, quick.dtype) == ((40, 60, 3), np.uint8)
  assert np.abs(quick.astype(int) - expected).mean() < 2
  image, is_grayscale = decode_exactly(encoded, "a")
  assert not is_grayscale
  assert np.array_equal(image, expected)


@pytest.mark.parametrize(("reduction", "shape"), [(1, (41, 62)), (2, (21, 31)), (4, (11, 16)), (8, (6, 8))])
def test_a_reduced_jpeg_has_the_rounded_up_size_and_looks_the_same(reduction, shape):
  image = make_image(41, 62)
  reduced = decode_quickly(encode(image, "jpeg", quality=95), "a", reduction)
  assert reduced.shape == (*shape, 3)
  down, across = (side * reduction for side in shape)
  padded = np.pad(np.asarray(image), ((0, down - 41), (0, across - 62), (0, 0)), "edge")
  expected = padded.reshape(shape[0], reduction, shape[1], reduction, 3).mean(axis=(1, 3))
  assert np.abs(reduced - expected).mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb_as_in_pillow(mode):
  image = make_image().convert(mode)
  encoded = encode(image, "png")
  expected = np.asarray(image.convert("RGB"))
  assert np.array_equal(decode_quickly(encoded, "a.JPEG", 2), expected)
  decoded, is_grayscale = decode_exactly(encoded, "a.JPEG")
  assert np.array_equal(decoded, expected)
  assert is_grayscale == (mode in ("1", "L", "LA"))


def test_a_grayscale_jpeg_becomes_rgb():
  encoded = encode(make_image().convert("L"), "jpeg")
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
  assert np.abs(decode_quickly(encoded, "a") - expected).max() <= 3
  image, is_grayscale = decode_exactly(encoded, "a")
  assert is_grayscale
  assert np.array_equal(image, expected)


@pytest.mark.parametrize("adobe", [True, False])
def test_a_cmyk_jpeg_becomes_rgb_as_in_pillow(adobe):
  encoded = encode(make_image().convert("CMYK"), "jpeg", quality=95)
  start = encoded.index(b"Adobe") - 4
  if not adobe:  # Values stay inverted, as Pillow supposes of every such file.
    length = int.from_bytes(encoded[start + 2 : start + 4], "big")
    encoded = encoded[:start] + encoded[start + 2 + length :]
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
  assert np.array_equal(decode_quickly(encoded, "a", 2), expected)
  assert np.abs(expected.astype(int) - np.asarray(make_image())).mean() < 4


def test_a_palette_with_alpha_loses_the_alpha_without_a_warning():
  palette = make_image().convert("P")
  encoded = encode(palette, "png", transparency=bytes(range(256)))
  assert np.array_equal(decode_quickly(encoded, "a"), np.asarray(palette.convert("RGB")))


def test_an_exif_orientation_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: turn by 90 degrees
  encoded = encode(make_image(), "jpeg", exif=exif)
  assert image_size(encoded, "a") == (40, 60)
  assert decode_quickly(encoded, "a").shape == (40, 60, 3)
  assert decode_exactly(encoded, "a")[0].size == (60, 40)


@pytest.fixture(
  params=["baseline", "optimized", "progressive", "restart", "gray", "cmyk", "4:4:4", "4:4:0", "4:1:1"], scope="module"
)
def whole(request):
  """A JPEG of noise, as all of its blocks then take many bits."""
  noise = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
  image = Image.fromarray(noise).resize((120, 96), Image.Resampling.BICUBIC)
  match request.param:
    case "optimized" | "progressive":
      return encode(image, "jpeg", **{request.param.removesuffix("d"): True})
    case "restart":
      return encode(image, "jpeg", restart_marker_rows=1)
    case "gray" | "cmyk":
      return encode(image.convert({"gray": "L", "cmyk": "CMYK"}[request.param]), "jpeg")
    case "baseline":
      return encode(image, "jpeg")
  return simplejpeg.encode_jpeg(np.asarray(image), 75, colorsubsampling=request.param.replace(":", ""))


def test_a_whole_jpeg_has_the_pixels_of_pillow(whole):
  expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
  assert np.array_equal(decode_exactly(whole, "a")[0], expected)


@pytest.mark.parametrize("stray", [b"stray", b"stray" * 100, bytes(5), bytes(500)], ids=len)
def test_stray_bytes_behind_the_last_pixel_are_forgiven(whole, stray):
  expected = np.asarray(decode_exactly(whole, "a")[0])
  for encoded in (whole[:-2] + stray + whole[-2:], whole + stray):
    assert np.array_equal(decode_exactly(encoded, "a")[0], expected)
    assert decode_quickly(encoded, "a", 2).shape[2] == 3


def scans_of(encoded):
  return [match.start() for match in re.finditer(b"\xff\xda", encoded)]


def with_missing_pixels(whole):
  """Yields copies of a JPEG that lost some of its pixels, each with what happened to it."""
  start, end = scans_of(whole)[0] + 14, len(whole) - 2
  for cut in (*np.linspace(start, end - 8, 25, dtype=int), *scans_of(whole)[1:]):
    yield f"cut at {cut}", whole[:cut] + whole[-2:]
    yield f"cut at {cut}, with stray bytes", whole[:cut] + whole[-2:] + b"stray"
  for size in (150, 400):
    for hole in np.linspace(start + 30, end - size - 8, 10, dtype=int):
      yield f"hole of {size} at {hole}", whole[:hole] + bytes(size) + whole[hole + size :]
  frame = re.search(rb"\xff[\xc0\xc2]\x00", whole).start() + 5
  for place in (frame, frame + 2):
    larger = int.from_bytes(whole[place : place + 2], "big") + 32
    yield f"size at {place}", whole[:place] + larger.to_bytes(2, "big") + whole[place + 2 :]


def test_a_jpeg_with_missing_pixels_is_refused(whole):
  accepted = []
  for what, encoded in with_missing_pixels(whole):
    for decode in (decode_exactly, lambda encoded, name: decode_quickly(encoded, name, 2)):
      try:
        decode(encoded, "a")
        accepted.append(what)
      except BrokenImageError as error:
        assert str(error).startswith("image 'a' is broken")
  assert not accepted


def test_zeros_in_a_flat_image_are_no_hole():
  flat = encode(Image.new("RGB", (600, 600), (255, 255, 255)), "jpeg", optimize=True)
  assert bytes(24) in flat[scans_of(flat)[0] :]
  assert decode_exactly(flat, "a")[0].getpixel((599, 599)) == (255, 255, 255)
  with pytest.raises(BrokenImageError, match="hole"):
    decode_exactly(flat[:-2] + b"stray" * 20 + bytes(99) + b"stray" + flat[-2:], "a")


def test_a_harmless_warning_does_not_hide_that_pixels_are_missing():
  whole = encode(make_image(), "jpeg")
  place = whole.index(b"JFIF") + 5
  odd = whole[:place] + b"\x07" + whole[place + 1 :]  # a revision of the format that does not exist
  assert np.array_equal(decode_exactly(odd, "a")[0], decode_exactly(whole, "a")[0])
  with pytest.raises(BrokenImageError, match="premature end"):
    decode_exactly(odd[:-100] + odd[-2:], "a")


@pytest.mark.parametrize("file_format", ["jpeg", "png"])
def test_broken_images_are_refused_by_name(refused, file_format):
  whole = encode(make_image(), file_format)
  for broken in (b"", b"no image", whole[:2], whole[:30], whole[: len(whole) // 2], whole[: len(whole) * 4 // 5]):
    for decode in (decode_quickly, decode_exactly):
      with refused("image 'cat/x.JPEG' is broken", "expected a whole image file"):
        decode(broken, "cat/x.JPEG")
  with refused("image 'cat/x.JPEG' is broken"):
    image_size(whole[:20], "cat/x.JPEG")


def test_sixteen_bit_images_are_refused_by_name(refused):
  encoded = encode(Image.fromarray(np.full((3, 4), 40000, np.uint16)), "png")
  for decode in (decode_quickly, decode_exactly):
    with refused("'z.png'", "mode 'I", "8 bits a channel"):
      decode(encoded, "z.png")


@pytest.mark.parametrize("file_format", ["jpeg", "png"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_name(refused, monkeypatch, file_format):
  encoded = encode(make_image(), file_format)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60)
  assert image_size(encoded, "bomb") == (40, 60)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
  for read in (image_size, decode_quickly, decode_exactly):
    with refused("'bomb' is 40x60", "at most the 2399 pixels"):
      read(encoded, "bomb")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself raises at twice its limit.
  for read in (image_size, decode_quickly, decode_exactly):
    with refused("'bomb'"):
      read(encoded, "bomb")
