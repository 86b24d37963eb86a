"""The model card: a head that Hugging Face reads, and tables whose numbers are those that are known."""

from __future__ import annotations

import numpy as np
import pytest

import sapr_jax as sapr

INPUTS = sapr.Inputs((8, 8, 3), mean=(0.5, 0.25, 0.125), std=(0.25,) * 3, class_names=[str(n) for n in range(30)])
RUN = {
  "model.name": "resnet56",
  "data.source": "tfds",
  "data.name": "cifar10",
  "data.validation_images": None,
  "data.stream": False,
  "data.mean": None,
  "prune.proposer": "generator",
  "train.epochs": 200,
  "train.decay_epochs": [100, 150],
}
MEASURED = {
  "macs": 125_485_706,
  "params": 855_770,
  "accuracy": 0.9381,
  "loss": 0.25,
  "latency_ms": {"1": 2.5, "64": 9},
}
SMALL = {"macs": 60_000_000, "params": 400_000, "latency_ms": {"1": 1.25, "64": 51}}
METRICS = {
  **SMALL,
  "accuracy": 0.9376,
  "loss": 0.26,
  "images": 10_000,
  "device": "NVIDIA H100",
  "prunable_macs_share": 0.48,
  "dense": MEASURED,
  "subnetwork": SMALL | {"accuracy": 0.9, "loss": 0.4},
}
WIDTHS = {"stage1_block1/conv1": (16, 9), "stage3_block9/conv1": (None, 7)}


def info(**changes):
  fields = {"module": "CifarResNet", "inputs": INPUTS, "metrics": METRICS, "config": RUN, "macs": 60_000_000}
  return sapr.ModelInfo(**fields | {"params": 400_000, "widths": WIDTHS} | changes)


def head_of(card):
  yaml = pytest.importorskip("yaml", reason="reading the head needs PyYAML")
  _, head, text = card.split("---\n", 2)
  return yaml.safe_load(head), text


def test_the_head_is_what_hugging_face_reads():
  head, _ = head_of(sapr.model_card(info()))
  assert head["library_name"] == "sapr_jax" and head["pipeline_tag"] == "image-classification"
  assert {"jax", "flax", "pruning"} <= set(head["tags"])
  assert (head["datasets"], head["metrics"]) == (["uoft-cs/cifar10"], ["accuracy"])
  assert "license" not in head
  assert head["model-index"] == [
    {
      "name": "resnet56, pruned",
      "results": [
        {
          "task": {"type": "image-classification"},
          "dataset": {"name": "cifar10", "type": "uoft-cs/cifar10", "split": "test"},
          "metrics": [{"type": "accuracy", "value": 0.9376}],
        }
      ],
    }
  ]
  head, _ = head_of(sapr.model_card(info(), name="mine: a #1", license="mit"))
  assert (head["license"], head["model-index"][0]["name"]) == ("mit", "mine: a #1")


def test_hugging_face_reads_it():
  hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
  card = hub.ModelCard(sapr.model_card(info()))
  (result,) = card.data.eval_results
  assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.9376, "cifar10")
  assert card.data.model_name == "resnet56, pruned"


@pytest.mark.parametrize(
  ("changes", "dataset"),
  [
    ({"data.source": "folder", "data.path": "somewhere/my: photos/"}, ("my: photos", None, "test")),
    ({"data.source": "digits", "data.stream": True}, ("digits", None, "validation")),
    ({"data.name": "imagenet2012", "data.validation_images": 10}, ("imagenet2012", "ILSVRC/imagenet-1k", "train")),
  ],
)
def test_the_data_set_is_that_of_the_run(changes, dataset):
  head, _ = head_of(sapr.model_card(info(config=RUN | changes)))
  (result,) = head["model-index"][0]["results"]
  name, on_hub, split = dataset
  assert result["dataset"] == {"name": name, "type": on_hub or name, "split": split}
  assert head.get("datasets") == (on_hub and [on_hub])


def rows(card, title):
  """Returns the cells of the table below a title."""
  lines = card.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
  assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, lines
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_have_the_numbers():
  card = sapr.model_card(info())
  assert rows(card, "Results") == [
    ["network", "accuracy", "loss", "MACs", "of dense", "parameters", "ms, batch 1", "ms, batch 64"],
    ["---", *["---:"] * 7],
    ["dense", "93.81%", "0.2500", "125.5 M", "100.0%", "855,770", "2.50", "9.00"],
    ["sub-network, before fine-tuning", "90.00%", "0.4000", "60.0 M", "47.8%", "400,000", "1.25", "51.00"],
    ["this model", "93.76%", "0.2600", "60.0 M", "47.8%", "400,000", "1.25", "51.00"],
  ]
  assert rows(card, "Widths of the pruned layers")[2:] == [
    ["`stage1_block1/conv1`", "16", "9", "56%"],
    ["`stage3_block9/conv1`", "", "7", ""],
  ]
  assert ["mean of each channel, of pixels in [0, 1]", "0.5000, 0.2500, 0.1250"] in rows(card, "Inputs")
  assert rows(card, "Inputs")[-1][1].endswith("19 and 10 more (in `info.json`)")
  assert "cut by `sapr_jax` to 47.8% of its multiply-accumulates" in card
  assert "on 10,000 test images. Latency is the median forward pass on NVIDIA H100." in card
  assert "--config.train.decay_epochs='(100, 150)'" in card and "data.mean=" not in card


def test_what_is_not_known_is_left_out():
  card = sapr.model_card(info(inputs=None, metrics={}, config={}, macs=None, widths={}, module="Net"))
  head, text = head_of(card)
  assert head == {"library_name": "sapr_jax", "tags": ["jax", "flax"]}
  titles = [line for line in text.splitlines() if line.startswith("#")]
  assert titles == ["# Net", "## Results", "## How to use it"]
  assert rows(card, "Results") == [["network", "parameters"], ["---", "---:"], ["this model", "400,000"]]
  assert "base=Net(...)" in card and "nan" not in card.lower() and "None" not in card


def test_other_numbers_and_configurations_are_shown_too():
  metrics = {"accuracy": 1, "top5": 0.99512, "seen": 12345, "note": "a|b\nc"}
  card = sapr.model_card(info(metrics=metrics, config={"my": {"rate": 0.1}}))
  for row in ("| top5 | 0.9951 |", "| seen | 12,345 |", "| note | a\\|b\\nc |"):
    assert f"\n{row}\n" in card
  assert '```json\n{\n  "my": {\n    "rate": 0.1' in card
  assert "100.00%" in card


def test_text_that_would_break_the_file_is_shown_in_one_line():
  hostile = "a\nlicense: mit\udcff\x7f```"
  names = [hostile, "b|c"]
  config = RUN | {"model.name": hostile, "data.source": "folder", "data.path": f"/x/{hostile}"}
  card = sapr.model_card(info(inputs=sapr.Inputs((8, 8, 3), class_names=names), config=config, module=hostile))
  head, _ = head_of(card)
  card.encode()
  assert "license" not in head
  assert rows(card, "Inputs")[-1][0] == "2 classes"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("x",), r"info must be a ModelInfo, got 'x'; sapr_jax\.load_info\(path\) returns it"),
    ((info(),), r"name must be text, got 3"),
  ],
)
def test_other_arguments_are_refused(arguments, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.model_card(*arguments, name=3)


def test_the_card_of_a_saved_model_loads_it(tmp_path, tiny, monkeypatch):
  inputs = sapr.Inputs((8, 8, 1), mean=[0.5], std=[0.5], class_names=list("abcdefghij"))
  sapr.save(tmp_path / "DIR", tiny.model, tiny.variables, inputs=inputs)
  card = (tmp_path / "DIR" / "README.md").read_text()
  code = card.partition("```python\n")[2].partition("```")[0]
  monkeypatch.chdir(tmp_path)
  found = {"batch": np.zeros((2, 8, 8, 1), np.uint8)}
  exec(code, found)
  assert set(found["names"]) <= set("abcdefghij") and len(found["names"]) == 2
