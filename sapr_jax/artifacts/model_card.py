"""The model card of a saved model: `README.md` in the form that Hugging Face reads, YAML and then Markdown.

Nothing is claimed that is not known: parts without numbers are left out, and so is the licence unless it is given.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sapr_jax import models
from sapr_jax.artifacts.model_info import ModelInfo
from sapr_jax.checks import check_type, shown
from sapr_jax.data import Inputs
from sapr_jax.errors import InputError

CARD = "README.md"
_NETWORKS = {"dense": "dense", "subnetwork": "sub-network, before fine-tuning", "": "this model"}
"""Where the numbers of a network are in `ModelInfo.metrics`, and what the table calls it; "": at the top."""
_MEASURED = {"accuracy", "loss", "macs", "params", "latency_ms", *_NETWORKS}
_HUB_DATASETS = {
  "cifar10": "uoft-cs/cifar10",
  "cifar100": "uoft-cs/cifar100",
  "imagenet2012": "ILSVRC/imagenet-1k",
  "mnist": "ylecun/mnist",
}
"""Name in TensorFlow Datasets -> name on Hugging Face."""
_CLASSES_SHOWN = 20


def model_card(info: ModelInfo, *, name: str = "", license: str | None = None) -> str:
  """Returns the model card of a saved model, in Markdown after a head in YAML.

  Args:
    info: What is known of it; `load_info` returns that.
    name: What to call it; by default the network's name.
    license: Identifier of a licence, such as "mit"; the card has none without.

  Raises:
    InputError: If an argument is of another kind.
  """
  check_type("info", info, ModelInfo, "sapr_jax.load_info(path) returns it")
  for argument, value in (("name", name), ("license", license)):
    if not isinstance(value, str) and not (argument == "license" and value is None):
      raise InputError(f"{argument} must be text, got {shown(value)}.")
  network = _text(info.config.get("model.name")) or info.module
  name = name or f"{network}{', pruned' if info.widths else ''}"
  parts = [
    _head(info, name, license),
    f"# {_clean(name)}",
    _summary(info, network),
    _results(info),
    _use(info),
    _inputs(info.inputs),
    _widths(info.widths),
    _how(info.config),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def _head(info: ModelInfo, name: str, license: str | None) -> str:
  """Returns the YAML that Hugging Face reads. Text is quoted as in JSON, of which YAML is a superset."""
  is_classifier = info.inputs is not None and len(info.inputs.shape) == 3
  tags = ["jax", "flax", *(["image-classification"] if is_classifier else [])]
  tags += ["pruning", "structured-pruning"] if info.widths else []
  lines = ["---", *([f"license: {_quoted(license)}"] if license else []), "library_name: sapr_jax"]
  lines += ["pipeline_tag: image-classification"] if is_classifier else []
  lines += ["tags:", *(f"- {tag}" for tag in tags)]
  dataset, on_hub = _dataset(info.config)
  lines += ["datasets:", f"- {_quoted(on_hub)}"] if on_hub else []
  accuracy = _number(info.metrics.get("accuracy"))
  if accuracy is not None:
    lines += ["metrics:", "- accuracy"]
  if accuracy is not None and dataset:
    lines += [
      "model-index:",
      f"- name: {_quoted(name)}",
      "  results:",
      "  - task:",
      "      type: image-classification",
      "    dataset:",
      f"      name: {_quoted(dataset)}",
      f"      type: {_quoted(on_hub or dataset)}",
      *([f"      split: {_split(info.config)}"] if _split(info.config) else []),
      "    metrics:",
      "    - type: accuracy",
      f"      value: {round(accuracy, 6)}",
    ]
  return "\n".join([*lines, "---"])


def _dataset(config: Mapping[str, Any]) -> tuple[str, str | None]:
  """Returns the name of the data set of a run, and its name on Hugging Face if it is known; ("", None) if not known."""
  source = config.get("data.source")
  if source == "folder":
    path = _text(config.get("data.path")).rstrip("/")
    return path.rpartition("/")[2], None
  name = _text(config.get("data.name")) if source == "tfds" else _text(source)
  return name, _HUB_DATASETS.get(name)


def _split(config: Mapping[str, Any]) -> str:
  """Returns the images that a run evaluated, as `split`."""
  if config.get("data.validation_images") is not None:
    return "train"  # a part of it that was held out
  if config.get("data.stream"):
    return "validation"
  return "test" if "data.stream" in config else ""


def _summary(info: ModelInfo, network: str) -> str:
  dataset, _ = _dataset(info.config)
  what = f"`{_clean(network)}`" + (f", trained on {_clean(dataset)}" if dataset else "")
  if not info.widths:
    return f"{what}."
  macs, full = info.macs, _number(_entry(info.metrics, "dense").get("macs"))
  share = f" to {macs / full:.1%} of its multiply-accumulates (MACs)" if macs and full else ""
  proposer = _text(info.config.get("prune.proposer"))
  how = f" as `{_clean(proposer)}` ranks them" if proposer else ""
  if proposer == "generator":
    how = (
      ", which an architecture generator chose and a group lasso on only these emptied (Gao et al., *Structural"
      " Alignment for Network Pruning through Partial Regularization*, ICCV 2023)"
    )
  return f"{what}, cut by `sapr_jax`{share}. Whole channels were removed{how}: the network is smaller, not masked."


def _results(info: ModelInfo) -> str:
  """Returns the table of what was measured, with the networks that it was made from."""
  entries = {title: _entry(info.metrics, place) for place, title in _NETWORKS.items()}
  own = entries["this model"]
  own = {"macs": info.macs, "params": info.params, **{name: value for name, value in own.items() if value is not None}}
  entries["this model"] = own
  full = _number(entries["dense"].get("macs"))
  batches = sorted({batch for entry in entries.values() for batch in _entry(entry, "latency_ms")}, key=_as_order)
  rows = [["network", "accuracy", "loss", "MACs", "of dense", "parameters", *(f"ms, batch {b}" for b in batches)]]
  for title, entry in entries.items():
    if not entry:
      continue
    accuracy, loss, macs = (_number(entry.get(key)) for key in ("accuracy", "loss", "macs"))
    params, latency = _number(entry.get("params")), _entry(entry, "latency_ms")
    times = [_number(latency.get(batch)) for batch in batches]
    rows.append(
      [
        title,
        "" if accuracy is None else f"{accuracy:.2%}",
        "" if loss is None else f"{loss:.4f}",
        "" if macs is None else _with_unit(macs),
        f"{macs / full:.1%}" if macs is not None and full else "",
        "" if params is None else f"{params:,.0f}",
        *("" if ms is None else f"{ms:.2f}" for ms in times),
      ]
    )
  used = [column for column in zip(*rows, strict=True) if any(column[1:])]
  table = [list(row) for row in zip(*used, strict=True)]
  notes = []
  if split := _split(info.config):
    which = {"train": "training images that were held out", "validation": "validation images", "test": "test images"}
    count = _number(info.metrics.get("images"))
    notes.append(f"Accuracy is that of the last epoch, on {'' if count is None else f'{count:,.0f} '}{which[split]}.")
  if device := _text(info.metrics.get("device")):
    notes.append(f"Latency is the median forward pass on {_clean(device)}.")
  others = {name: value for name, value in info.metrics.items() if _is_shown(name, value)}
  more = [["measured", "value"], *([_clean(name), _shown_value(value)] for name, value in others.items())]
  return "\n\n".join(
    ["## Results", _table(table), *([" ".join(notes)] if notes else []), *([_table(more)] if others else [])]
  )


def _is_shown(name: str, value: Any) -> bool:
  return name not in _MEASURED | {"images", "device", "prunable_macs_share"} and isinstance(value, int | float | str)


def _use(info: ModelInfo) -> str:
  is_of_package, module, inputs = info.module in models.CLASSES, _clean(info.module), info.inputs
  base = "" if is_of_package else f", base={module}(...)"
  lines = ["import sapr_jax as sapr", "", 'folder = "DIR"  # where this file lies']
  lines.append(f"model, variables = sapr.load(folder{base})")
  if inputs is None:
    return _code("How to use it", [*lines, "outputs = model.apply(variables, inputs)"])
  kind = "inputs" if inputs.mean is None else "images, bytes (uint8)"
  shape = "of any size" if inputs.resize else f"[{', '.join(['N', *map(str, inputs.shape)])}]"
  lines += [
    "inputs = sapr.load_info(folder).inputs",
    f"outputs = model.apply(variables, inputs.prepare(batch))  # batch: {kind} {shape}",
  ]
  if inputs.class_names is not None:
    lines.append("names = [inputs.class_names[number] for number in outputs.argmax(-1)]")
  code = _code("How to use it", lines)
  if inputs.mean is None or not is_of_package:
    return code
  return f'{code}\n\n`sapr.evaluate(folder, data="IMAGES")` measures it on image files `test/<class>/*` in a folder.'


def _code(title: str, code: Sequence[str]) -> str:
  return "\n".join([f"## {title}", "", "```python", *code, "```"])


def _inputs(inputs: Inputs | None) -> str:
  if inputs is None:
    return ""
  rows = [["", "value"], ["shape", f"{inputs.shape}, {inputs.dtype}"]]
  if inputs.mean is not None and inputs.std is not None:
    for name, numbers in (("mean", inputs.mean), ("deviation", inputs.std)):
      rows.append([f"{name} of each channel, of pixels in [0, 1]", ", ".join(f"{x:.4f}" for x in numbers)])
  if inputs.resize is not None:
    rows.append(["resizing", f"shorter side to {inputs.resize} pixels, then the centre"])
  if (names := inputs.class_names) is not None:
    shown_names = ", ".join(_cell(name) for name in names[:_CLASSES_SHOWN])
    more = f" and {len(names) - _CLASSES_SHOWN} more (in `info.json`)" if len(names) > _CLASSES_SHOWN else ""
    rows.append([f"{len(names)} classes", shown_names + more])
  return "\n\n".join(["## Inputs", _table(rows, align="--", escaped=True)])


def _widths(widths: Mapping[str, tuple[int | None, int]]) -> str:
  if not widths:
    return ""
  rows = [["layer", "dense", "kept", "share"]]
  for layer, (dense, kept) in widths.items():
    known = dense is not None and dense > 0
    rows.append([f"`{layer}`", f"{dense:,}" if known else "", f"{kept:,}", f"{kept / dense:.0%}" if known else ""])  # type: ignore[operator]
  return "\n\n".join(["## Widths of the pruned layers", _table(rows)])


def _how(config: Mapping[str, Any]) -> str:
  """Returns the command of a run, or the configuration of anything else."""
  if not config:
    return ""
  if not {"model.name", "data.source", "train.epochs"} <= config.keys():
    return "\n".join(["## How it was made", "", "```json", _clean_lines(json.dumps(config, indent=2)), "```"])
  flags = [f"--config.{field}={_flag(value)}" for field, value in config.items() if value is not None]
  command = " \\\n  ".join(["python -m sapr_jax.main --config configs/default.py --workdir RUN", *flags])
  code = ["```sh", _clean_lines(command), "```"]
  title = "<summary>The command, with every field of the configuration</summary>"
  return "\n".join(["## How it was made", "", "<details>", title, "", *code, "", "</details>"])


def _flag(value: Any) -> str:
  if isinstance(value, list):
    return shlex.quote(str(tuple(value)))
  return shlex.quote(str(value))


def _table(rows: Sequence[Sequence[str]], align: str | None = None, *, escaped: bool = False) -> str:
  """Returns a table in Markdown, whose first column is text and the others numbers, unless `align` says otherwise."""
  lines = [f"| {' | '.join(cell if escaped else _cell(cell) for cell in row)} |" for row in rows]
  marks = align or "-" + ":" * (len(rows[0]) - 1)
  lines.insert(1, f"|{'|'.join('---:' if mark == ':' else '---' for mark in marks)}|")
  return "\n".join(lines)


def _cell(text: str) -> str:
  return _clean(text).replace("|", "\\|")


def _clean(text: str) -> str:
  """Returns text in one line that any file can hold: names of folders may have line breaks and what UTF-8 lacks."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _clean_lines(text: str) -> str:
  return "\n".join(map(_clean, text.split("\n"))).replace("```", "` ` `")


def _quoted(text: str) -> str:
  return json.dumps(_clean(text), ensure_ascii=False)


def _entry(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Returns the numbers of one network; of this one for the name ""."""
  found = metrics.get(name, {}) if name else {key: metrics[key] for key in metrics if key not in _NETWORKS}
  return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number and abs(value) < 1e30 else None


def _text(value: Any) -> str:
  return value if isinstance(value, str) else ""


def _shown_value(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else _clean(value) if isinstance(value, str) else f"{value:,}"


def _as_order(batch: str) -> tuple[int, str]:
  return (int(batch), batch) if batch.isdecimal() else (2**31, batch)


def _with_unit(count: float) -> str:
  """Returns a number of MACs in millions, or in thousands or as it is where that is too small."""
  if count >= 1e5:
    return f"{count / 1e6:,.3f} M" if count < 1e7 else f"{count / 1e6:,.1f} M"
  return f"{count:,.0f}"
