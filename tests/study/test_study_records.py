"""What the study records of its runs, and the page that is made of it."""

from __future__ import annotations

import dataclasses

import pytest
from entries import entry

import sapr_jax as sapr
from sapr_jax.artifacts.files import write_json
from study import page
from study.records import check_folder, entry_of, head_of, is_finished, recorded, update
from study.rows import grid, job_of
from study.sizes import SIZES

HEAD = head_of("reduced", SIZES["reduced"], {}, "JPEG copy of CIFAR-10")


def test_a_folder_of_runs_belongs_to_one_study(tmp_path):
  check_folder(tmp_path / "reduced", HEAD)
  check_folder(tmp_path / "reduced", HEAD)
  other = HEAD | {"set": {"train.epochs": 2}}
  check_folder(tmp_path / "reduced", other)  # no run has begun
  check_folder(tmp_path / "reduced", HEAD)
  workdir = tmp_path / "reduced" / "resnet20" / "gamma=0" / "seed_0"
  workdir.mkdir(parents=True)
  write_json(workdir / "config.json", {})
  with pytest.raises(sapr.InputError, match=r"holds runs with another 'set': {}, now {\"train.epochs\": 2}; name"):
    check_folder(tmp_path / "reduced", other)
  check_folder(tmp_path / "reduced", HEAD)


def test_a_damaged_entry_is_no_finished_run(tmp_path):
  write_json(tmp_path / "study.json", {"row": 1})
  assert not is_finished(tmp_path)
  write_json(tmp_path / "study.json", entry("gamma=0", 0))
  assert is_finished(tmp_path)


def test_results_files_keep_what_other_machines_ran(tmp_path):
  file, folder = tmp_path / "study.json", tmp_path / "reduced"
  for seed in (0, 1):
    workdir = folder / "resnet20" / "gamma=0" / f"seed_{seed}"
    workdir.mkdir(parents=True)
    write_json(workdir / "study.json", entry("gamma=0", seed, dense=50.0))
    update(file, HEAD, folder)
    (folder / "resnet20" / "gamma=0" / f"seed_{seed}" / "study.json").unlink()
  assert [row["seed"] for row in recorded(file, HEAD)] == [0, 1]
  assert recorded(tmp_path / "none.json", HEAD) == []
  with pytest.raises(sapr.InputError, match=r"has 2 runs with another 'data': \"JPEG.*, now \"another\"; name another"):
    recorded(file, HEAD | {"data": "another"})


def test_the_entry_of_a_run(tmp_path):
  job = job_of(grid(SIZES["reduced"])[0], 1, tmp_path, None, {})
  summary = {
    "dense": {"accuracy": 0.5, "macs": 200},
    "subnetwork": {"accuracy": 0.25, "macs": 100},
    "pruned": {"accuracy": 0.51234, "macs": 100},
    "run": {"device": "cpu", "versions": {}},
  }
  records = [
    {"step": 1, "test_accuracy": 0.5, "weight_seconds": 3.0},
    {"step": 2, "test_accuracy": 0.51234, "weight_seconds": 1.0, "generator_seconds": 0.5, "hamming_distance": 0.1},
  ]
  found = entry_of(job, summary, records)
  assert found["accuracy"] == {"dense": 50.0, "subnetwork": 25.0, "pruned": 51.234} and found["macs_share"] == 0.5
  assert found["curves"]["full_model"] == {"first": 1, "values": [50.0, 51.23]}
  assert found["curves"]["hamming"] == {"first": 2, "values": [0.1]}
  assert found["seconds"] == {"total": 4.5, "weight_epoch": 1.0, "generator_epoch": 0.5}


def test_every_size_has_its_part_of_the_page():
  assert set(page.SMALL) < set(SIZES)
  assert all(page.paragraph(size).endswith(".") for size in (*(set(SIZES) - set(page.SMALL)), "small"))


def test_small_sizes_have_one_table_of_rows_and_one_of_claims(tmp_path, results):
  write_json(tmp_path / "cifar10_study_reduced.json", {**HEAD, "rows": list(results.entries)})
  page.renew(tmp_path, tmp_path / "results.md")
  text = (tmp_path / "results.md").read_text()
  assert "| **main row** | 62.00 ± 1.00 (56.00 ± 1.00) |" in text and "| uniform_width | 60.00 ± 1.00 |" in text
  assert "| (b) Partial regularization makes a sub-network that is good before fine-tuning | undecided |" in text
  assert "(appendix), the paper's claims at reduced: " in text
  assert text.count("\n| row |") == 1 and not (tmp_path / "images").exists()


def test_the_page_says_which_size_it_is_and_shows_every_claim(tmp_path, results):
  pytest.importorskip("matplotlib", reason="figures need pip install 'sapr_jax[report]'")
  head = {**HEAD, "size": "full"}
  write_json(tmp_path / "cifar10_study_full.json", {**head, "rows": list(results.entries)})
  page.renew(tmp_path, tmp_path / "results.md")
  text = (tmp_path / "results.md").read_text()
  assert "## Size: full" in text and "gamma=0.02" in text
  assert all(f"({letter})" in text for letter in "abcdef")
  for line in text.splitlines():
    if "](images/" in line:
      assert (tmp_path / line.split("](")[1].rstrip(")")).is_file()


def test_the_mean_history_over_seeds(results):
  assert page.mean_history(dataclasses.replace(results, entries=[]), "gamma=0.02", "", {0, 1, 2}) is None
  history = page.mean_history(results, "gamma=0.02", "", {0, 1, 2})
  assert history.series("test_accuracy") == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
  results.entries[0]["curves"]["full_model"]["values"] = [40.0, 50.0, 60.0, 70.0]  # seed 0
  history = page.mean_history(results, "gamma=0.02", "", {1, 0})
  assert history.series("test_accuracy") == ([1, 2, 3, 4], pytest.approx([0.25, 0.35, 0.45, 0.55]))
