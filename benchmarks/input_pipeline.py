"""ImageNet images a second that one core prepares for training: our pipeline beside Pillow in a PyTorch DataLoader.

    python -m benchmarks.input_pipeline [--quick] --data imagenet_sample.tar

`--data` is a tar or a folder with JPEG files, which are read again and again; they stay in the cache of the system, so
disks are not measured. Both pipelines have one worker process, batches of the same size and the same images, and run in
turns; the first batches of each run are left out, and medians are reported.

What is compared: ours crops, resizes and flips, and gives uint8 for the device to normalize. The peer does what
torchvision's ImageNet recipe does with Pillow images (`RandomResizedCrop`, `RandomHorizontalFlip`, `ToTensor`,
`Normalize`), written out here as torchvision need not be installed; it gives float32. Since part of the difference is
that conversion, the peer without it ("uint8") is measured as well. Not included: the transfer to the device, and the
normalization there.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import cpu_name, needed, parser, table, versions
from sapr_jax import data
from sapr_jax.artifacts.files import write_json
from sapr_jax.data.decoding import decode_exactly, decode_quickly
from sapr_jax.data.recipe import resized_size
from sapr_jax.data.sources.folder import FolderSource

torch = needed("torch", "bench")

RESULTS = pathlib.Path("results/input_pipeline.json")
_PACKAGES = ("numpy", "grain", "simplejpeg", "opencv-python-headless", "pillow", "torch")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WARM_UP_BATCHES = 4
_SIZE = 224


def main() -> None:
  arguments = parser(__doc__, "small batches, half a second, once")
  arguments.add_argument("--data", type=pathlib.Path, required=True, help="tar or folder of JPEG files")
  args = arguments.parse_args()
  batch_size, seconds, runs = (8, 0.5, 1) if args.quick else (128, 8.0, 5)
  with tempfile.TemporaryDirectory() as folder:
    files = find_images(args.data, folder)
    rates = measure_pipelines(files, batch_size, seconds, runs)
    costs = measure_costs(files, runs)
  report = {
    "command": " ".join(["python -m benchmarks.input_pipeline", *sys.argv[1:]]),
    "images": len(files),
    "cpu": cpu_name(),
    "cores": os.cpu_count(),
    "versions": versions(_PACKAGES),
    "images_per_second_with_one_worker": rates,
    "milliseconds_of_processor_time_per_image": costs,
  }
  if not args.quick:
    write_json(RESULTS, report)
  print(tables(report))


def find_images(path: pathlib.Path, folder: str) -> list[str]:
  """Lists the JPEG files of a folder, or of a tar that is unpacked into `folder`."""
  if path.is_file():
    with tarfile.open(path) as tar:
      tar.extractall(folder, filter="data")
    path = pathlib.Path(folder)
  files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in (".jpeg", ".jpg"))
  if not files:
    sys.exit(f"error: there are no JPEG files in {path}")
  return files


class TorchvisionDataset:
  """Map-style dataset with torchvision's training transform on Pillow images."""

  def __init__(self, files: list[str], order: np.ndarray, to_float: bool) -> None:
    self.files, self.order, self.to_float = files, order, to_float

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, index: int) -> tuple[Any, int]:
    place = int(self.order[index])
    with open(self.files[place], "rb") as file:
      image = Image.open(file).convert("RGB")
    return peer_training(image, self.to_float), place


def peer_training(image: Any, to_float: bool = True) -> Any:
  """RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and Normalize, or without the last two."""
  top, left, height, width = peer_crop(image.height, image.width)
  image = image.crop((left, top, left + width, top + height)).resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
  if torch.rand(1) < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return peer_tensor(image) if to_float else torch.from_numpy(np.array(image))


def peer_evaluation(image: Any) -> Any:
  """Resize(256), CenterCrop(224), ToTensor and Normalize."""
  height, width = resized_size(image.height, image.width, 256)
  top, left = round((height - _SIZE) / 2), round((width - _SIZE) / 2)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  return peer_tensor(image.crop((left, top, left + _SIZE, top + _SIZE)))


def peer_tensor(image: Any) -> Any:
  """ToTensor and Normalize."""
  tensor = torch.from_numpy(np.array(image)).permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
  mean, std = torch.tensor(_MEAN).view(-1, 1, 1), torch.tensor(_STD).view(-1, 1, 1)
  return tensor.sub_(mean).div_(std)


def peer_crop(height: int, width: int) -> tuple[int, int, int, int]:
  """RandomResizedCrop.get_params."""
  log_ratio = torch.log(torch.tensor((3 / 4, 4 / 3)))
  for _ in range(10):
    area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
    aspect = torch.exp(torch.empty(1).uniform_(log_ratio[0].item(), log_ratio[1].item())).item()
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(torch.randint(0, height - crop_height + 1, size=(1,)).item())
      left = int(torch.randint(0, width - crop_width + 1, size=(1,)).item())
      return top, left, crop_height, crop_width
  side = min(height, width)  # Close enough for the rare image that comes here.
  return (height - side) // 2, (width - side) // 2, side, side


def our_batches(files: list[str], order: np.ndarray, recipe: data.Recipe) -> Iterator[Any]:
  split = FolderSource("", files, np.arange(len(files), dtype=np.int32))
  return data.stream_batches(split, order, recipe=recipe, seed=0, purpose=0, epoch=0, workers=1)


def peer_batches(files: list[str], order: np.ndarray, to_float: bool) -> Iterator[Any]:
  dataset: Any = TorchvisionDataset(files, order.ravel(), to_float)
  # Spawned like our workers, as a fork of a process with threads may hang.
  yield from torch.utils.data.DataLoader(
    dataset, batch_size=order.shape[1], num_workers=1, multiprocessing_context="spawn"
  )


def measure_pipelines(files: list[str], batch_size: int, seconds: float, runs: int) -> dict[str, dict[str, Any]]:
  """Measures each pipeline `runs` times, in turns."""
  # More than any of them can read in that time.
  num_batches = _WARM_UP_BATCHES + math.ceil(5000 * seconds / batch_size)
  order = np.random.default_rng(0).integers(0, len(files), (num_batches, batch_size)).astype(np.int32)
  pipelines: dict[str, Callable[[], Iterator[Any]]] = {
    "training, ours": lambda: our_batches(files, order, data.TrainingRecipe(_SIZE)),
    "training, Pillow and DataLoader": lambda: peer_batches(files, order, to_float=True),
    "training, Pillow and DataLoader, uint8": lambda: peer_batches(files, order, to_float=False),
    "evaluation, ours": lambda: our_batches(files, order, data.EvaluationRecipe(_SIZE)),
  }
  rates: dict[str, list[float]] = {name: [] for name in pipelines}
  for _ in range(runs):
    for name, start in pipelines.items():
      rates[name].append(images_per_second(start(), batch_size, seconds))
  return {name: {"median": statistics.median(values), "runs": values} for name, values in rates.items()}


def images_per_second(batches: Any, batch_size: int, seconds: float) -> float:
  """Takes batches as fast as they come, for `seconds` after the first few, and closes the iterator."""
  for _ in range(_WARM_UP_BATCHES):
    next(batches)
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    next(batches)
    count += 1
  elapsed = time.perf_counter() - start
  batches.close()
  return round(count * batch_size / elapsed, 1)


def measure_costs(files: list[str], runs: int) -> dict[str, float]:
  """Measures the steps for one image in this process, in turns: medians in milliseconds."""
  torch.set_num_threads(1)
  contents, bits = [pathlib.Path(file).read_bytes() for file in files], np.random.PCG64(0)
  training, evaluation = data.TrainingRecipe(_SIZE), data.EvaluationRecipe(_SIZE)

  def open_with_pillow(content: bytes) -> Any:
    return Image.open(io.BytesIO(content)).convert("RGB")

  steps: dict[str, Callable[[bytes], Any]] = {
    "decode, ours in training": lambda content: decode_quickly(content, ""),
    "decode, ours in evaluation": lambda content: decode_exactly(content, ""),
    "decode, Pillow": open_with_pillow,
    "training, ours": lambda content: training(content, "", bits),
    "training, Pillow": lambda content: peer_training(open_with_pillow(content)),
    "training, Pillow, uint8": lambda content: peer_training(open_with_pillow(content), to_float=False),
    "evaluation, ours": lambda content: evaluation(content, "", bits),
    "evaluation, Pillow": lambda content: peer_evaluation(open_with_pillow(content)),
  }
  times: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(runs + 1):
    for name, step in steps.items():
      start = time.process_time()
      for content in contents:
        step(content)
      times[name].append(1000 * (time.process_time() - start) / len(contents))
  return {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}


def tables(report: Mapping[str, Any]) -> str:
  """Formats the rates and costs as Markdown, with ratios to ours."""
  rates, costs = report["images_per_second_with_one_worker"], report["milliseconds_of_processor_time_per_image"]
  ours, rows = rates["training, ours"]["median"], []
  for name, rate in rates.items():
    ratio = f"{ours / rate['median']:.2f}x" if "Pillow" in name else ""
    rows.append([name, f"{rate['median']:.0f}", f"{min(rate['runs']):.0f} to {max(rate['runs']):.0f}", ratio])
  of_pipelines = table(["pipeline, one worker process", "images/s", "lowest to highest", "ours is faster by"], rows)
  of_steps = [[name, f"{cost:.2f}"] for name, cost in costs.items()]
  return f"{of_pipelines}\n\n{table(['one image in one process', 'ms of processor time'], of_steps)}"


if __name__ == "__main__":
  main()
