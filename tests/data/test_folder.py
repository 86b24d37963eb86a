"""Image folders: what is read, in which order, and what is refused."""

import numpy as np
import pytest

from sapr_jax.data import DataSpec, load_dataset

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def write_image(path, value, *, mode="RGB", size=(4, 3)):
  """Writes an image of one colour; `size` is (width, height)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


@pytest.fixture
def root(tmp_path):
  """Two classes, with 3 and 2 training images and one test image each."""
  folder = tmp_path / "pets"
  for name, values in (("dog", (10, 11)), ("cat", (0, 1, 2))):
    for number, value in enumerate(values):
      write_image(folder / "train" / name / f"{number}.png", (value, value, 100))
    write_image(folder / "test" / name / "0.png", (values[0], 50, 100))
  return folder


def test_classes_and_files_come_in_sorted_order(root):
  dataset = load_dataset(DataSpec("folder", path=str(root)))
  assert (dataset.name, dataset.class_names) == ("pets", ("cat", "dog"))
  assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
  assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11]
  assert dataset.test.labels.tolist() == [0, 1]
  assert dataset.test.images[:, 1, 2].tolist() == [[0, 50, 100], [10, 50, 100]]
  assert dataset.image_shape == (3, 4, 3)


def test_pixels_keep_their_place(tmp_path):
  pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
  for split in ("train", "test"):
    (tmp_path / split / "only").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / split / "only" / "a.bmp")
  dataset = load_dataset(DataSpec("folder", path=str(tmp_path)))
  assert np.array_equal(dataset.train.images, pixels[None])


def test_all_extensions_count_in_any_case_and_other_files_do_not(root):
  cats = root / "train" / "cat"
  for extension in ("jpg", "JPEG", "Png", "bmp", "ppm", "webp"):
    write_image(cats / f"x.{extension}", (9, 9, 9))
  (cats / "notes.txt").write_text("not an image")
  (cats / ".hidden.png").write_text("not an image")
  (cats / "folder.png").mkdir()
  (root / "train" / ".cache").mkdir()
  (root / "train" / "readme.md").write_text("not a class")
  dataset = load_dataset(DataSpec("folder", path=str(root)))
  assert np.bincount(dataset.train.labels).tolist() == [3 + 6, 2]


def test_a_grayscale_set_has_one_channel(tmp_path):
  for split in ("train", "test"):
    write_image(tmp_path / split / "only" / "a.png", 7, mode="L")
    write_image(tmp_path / split / "only" / "b.png", (9, 255), mode="LA")
    write_image(tmp_path / split / "only" / "c.png", 1, mode="1")
  dataset = load_dataset(DataSpec("folder", path=str(tmp_path)))
  assert dataset.image_shape == (3, 4, 1)
  assert dataset.train.images[:, 0, 0, 0].tolist() == [7, 9, 255]


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_colour_image_makes_the_set_rgb(tmp_path, split):
  for folder in ("train", "test"):
    write_image(tmp_path / folder / "only" / "a.png", 7, mode="L")
  write_image(tmp_path / split / "only" / "b.png", (1, 2, 3))
  dataset = load_dataset(DataSpec("folder", path=str(tmp_path)))
  assert dataset.train.images[0, 0, 0].tolist() == [7, 7, 7]
  assert getattr(dataset, split).images[1, 0, 0].tolist() == [1, 2, 3]


def test_palette_and_alpha_images_become_rgb(tmp_path):
  for split in ("train", "test"):
    write_image(tmp_path / split / "only" / "a.png", (1, 2, 3, 255), mode="RGBA")
    colour = Image.new("RGB", (4, 3), (4, 5, 6))
    colour.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / split / "only" / "b.png")
  dataset = load_dataset(DataSpec("folder", path=str(tmp_path)))
  assert dataset.train.images[:, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_subset_is_balanced_and_reads_no_other_file(root):
  for number in range(20):
    write_image(root / "train" / "cat" / f"more{number}.png", (100 + number, 0, 0))
  first = load_dataset(DataSpec("folder", path=str(root), train_images=4, test_images=2, seed=3))
  assert np.bincount(first.train.labels).tolist() == [2, 2]
  chosen = set(first.train.images[:, 0, 0, 0].tolist())
  for file in (root / "train" / "cat").iterdir():
    if np.asarray(Image.open(file))[0, 0, 0] not in chosen:
      file.write_bytes(b"broken")
  again = load_dataset(DataSpec("folder", path=str(root), train_images=4, test_images=2, seed=3))
  assert np.array_equal(first.train.images, again.train.images)
  assert len(again.test) == 2


def test_missing_folders_are_refused(root, tmp_path, refused):
  with refused("source=folder needs the path", "train/<class>/*"):
    load_dataset(DataSpec("folder"))
  with refused("there is no folder", "absent"):
    load_dataset(DataSpec("folder", path=str(tmp_path / "absent")))
  (root / "test").rename(root / "val")
  with refused("has no 'test' folder", "found 'train', 'val'", "rename"):
    load_dataset(DataSpec("folder", path=str(root)))


def test_differing_and_missing_classes_are_refused(root, tmp_path, refused):
  write_image(root / "train" / "bird" / "0.png", (0, 0, 0))
  write_image(root / "test" / "cow" / "0.png", (0, 0, 0))
  with refused("different classes", "only in train: 'bird'", "only in test: 'cow'"):
    load_dataset(DataSpec("folder", path=str(root)))
  for split in ("train", "test"):
    (tmp_path / "bare" / split).mkdir(parents=True)
  with refused("has no class folder"):
    load_dataset(DataSpec("folder", path=str(tmp_path / "bare")))


def test_an_empty_class_is_refused(root, refused):
  (root / "test" / "dog" / "0.png").rename(root / "test" / "dog" / "0.gif")
  with refused("class folder", str(root / "test" / "dog"), "holds no image", ".png"):
    load_dataset(DataSpec("folder", path=str(root)))


def test_unreadable_images_are_refused_by_name(root, refused):
  path = root / "train" / "dog" / "1.png"
  whole = path.read_bytes()
  for content in (b"", b"no image", whole[:20], whole[:40]):
    path.write_bytes(content)
    with refused("is broken", str(path)):
      load_dataset(DataSpec("folder", path=str(root)))


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "ppm", "webp"])
def test_truncated_images_are_refused(root, refused, extension):
  path = root / "test" / "cat" / f"1.{extension}"
  noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
  Image.fromarray(noise).save(path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) * 4 // 5])
  with refused("is broken", str(path)):
    load_dataset(DataSpec("folder", path=str(root)))


def test_sixteen_bit_images_are_refused(root, refused):
  path = root / "train" / "cat" / "z.png"
  Image.fromarray(np.full((3, 4), 40000, np.uint16)).save(path)
  with refused(str(path), "mode 'I", "8 bits a channel"):
    load_dataset(DataSpec("folder", path=str(root)))


def test_images_of_another_size_are_refused_with_both_sizes(root, refused):
  write_image(root / "test" / "dog" / "1.png", (0, 0, 0), size=(5, 3))
  with refused(str(root / "test" / "dog" / "1.png"), "is 3x5", "is 3x4"):
    load_dataset(DataSpec("folder", path=str(root)))


def test_too_large_a_subset_names_the_split(root, refused):
  with refused(str(root / "train"), "cannot choose 6 of 5 images"):
    load_dataset(DataSpec("folder", path=str(root), train_images=6))
  with refused(str(root / "test"), "cannot choose 3 of 2 images"):
    load_dataset(DataSpec("folder", path=str(root), test_images=3))


def test_broken_images_are_left_out_as_far_as_is_allowed(root, refused):
  for file in ("train/cat/1.png", "test/cat/0b.png"):
    (root / file).write_bytes(b"broken")
  dataset = load_dataset(DataSpec("folder", path=str(root), skip_broken=2))
  assert dataset.train.labels.tolist() == [0, 0, 1, 1]
  assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 2, 10, 11]
  assert dataset.test.labels.tolist() == [0, 1]
  assert [[*broken] for broken in dataset.broken.values()] == [[1], [1]]
  assert f"{str(root / 'train/cat/1.png')!r} is broken" in dataset.broken["train"][1]
  with refused("2 images are broken, more than the 1", str(root / "test/cat/0b.png"), "or allow more"):
    load_dataset(DataSpec("folder", path=str(root), skip_broken=1))
  (root / "test" / "dog" / "0.png").write_bytes(b"")
  (root / "test" / "cat" / "0.png").write_bytes(b"")
  with refused("hold 4 and 0 images"):
    load_dataset(DataSpec("folder", path=str(root), skip_broken=9))
