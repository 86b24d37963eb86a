"""The work directory: what may differ when a run resumes, and what a kill or damage leaves there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re

import pytest

import sapr_jax as sapr
from sapr_jax.configs import digits
from sapr_jax.errors import InputError, os_errors_in_one_line
from sapr_jax.training import workdir


def test_what_does_not_change_the_result_may_differ(tmp_path):
  config = digits.get_config()
  workdir.make_workdir(tmp_path / "run", config)
  config.steps_per_call, config.checkpoint.keep, config.data.path = 4, 5, "elsewhere"
  workdir.check_workdir(tmp_path / "run", config)
  config.seed = 1
  with pytest.raises(sapr.InputError, match="seed was 0 and is now 1"):
    workdir.check_workdir(tmp_path / "run", config)


def test_a_field_that_another_version_did_not_have_is_named(tmp_path):
  config = digits.get_config()
  workdir.make_workdir(tmp_path / "run", config)
  file = tmp_path / "run" / "config.json"
  fields = json.loads(file.read_text())
  del fields["prune.statistics_batches"]
  file.write_text(json.dumps(fields))
  with pytest.raises(
    sapr.InputError, match=r"another version .* prune\.statistics_batches is only in .*a new --workdir"
  ):
    workdir.check_workdir(tmp_path / "run", config)


ENTRY = {"accuracy": 0.5, "macs": 1, "params": 1, "latency_ms": {}}
WITHOUT_PRUNED = json.dumps({"dense": ENTRY, "subnetwork": ENTRY}).encode()
WITHOUT_PARAMS = json.dumps({key: ENTRY | {"params": None} for key in ("dense", "subnetwork", "pruned")}).encode()
WITHOUT_LATENCY = WITHOUT_PARAMS.replace(b'"params": null, "latency_ms": {}', b'"params": 1')


@pytest.mark.parametrize(
  "content",
  [
    b"{",
    b"[]",
    b'{"dense": 1, "subnetwork": 2, "pruned": 3}',
    b"\xff",
    WITHOUT_PRUNED,
    WITHOUT_PARAMS,
    WITHOUT_LATENCY,
  ],
)
def test_a_damaged_summary_is_none(tmp_path, content):
  for name in ("dense", "pruned"):
    (tmp_path / name).mkdir()
  (tmp_path / "summary.json").write_bytes(content)
  assert workdir.read_summary(tmp_path) is None


def test_what_a_killed_run_had_begun_to_write_is_removed(tmp_path):
  config = digits.get_config()
  workdir.make_workdir(tmp_path, config)
  (tmp_path / ".pruned.tmp-abc").mkdir()
  (tmp_path / ".pruned.tmp-abc" / "weights.safetensors").write_text("half")
  for name in (".summary.json.tmp-abc", ".hidden", "summary.json"):
    (tmp_path / name).write_text("{")
  with workdir.locked(tmp_path, config):
    left = {path.name for path in tmp_path.iterdir()}
  assert left == {"config.json", ".lock", ".hidden", "summary.json"}


def test_a_file_system_without_locks_is_said_and_other_errors_end_the_run(tmp_path, monkeypatch, capsys):
  def fail_with(number):
    def fail(file, operation):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)

  for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
    fail_with(number)
    with workdir.locked(tmp_path, digits.get_config()):
      assert f"warning: {tmp_path} is on a file system without locks; keep other runs" in capsys.readouterr().err
  fail_with(errno.EIO)
  with pytest.raises(OSError, match=r"Input/output error: .*\.lock"), workdir.locked(tmp_path, digits.get_config()):
    pass


def test_an_error_of_the_system_is_one_line_with_its_path(tmp_path):
  for number, reason in ((errno.ESTALE, "Stale file handle"), (errno.ETIMEDOUT, "Connection timed out")):
    for name, shown in (("a/file", "a/file"), (None, tmp_path)):
      text = f"{shown} cannot be used ({reason}); what is on disk is whole: fix the disk or the path, and the same"
      with pytest.raises(InputError, match=re.escape(text)), os_errors_in_one_line(tmp_path):
        raise OSError(number, os.strerror(number), *([name] if name else []))
  with pytest.raises(TimeoutError), os_errors_in_one_line(tmp_path):  # of Orbax: a process has gone
    raise TimeoutError("barrier")


def test_a_damaged_network_file_is_named_and_a_missing_one_warned_about(tmp_path, capsys):
  config = digits.get_config()
  workdir.make_workdir(tmp_path, config)
  (tmp_path / workdir.NETWORK).write_text("{")
  with pytest.raises(InputError, match=r"network\.json is damaged; remove it, and the run goes on"):
    workdir.check_workdir(tmp_path, config)
  (tmp_path / workdir.NETWORK).unlink()
  workdir.check_workdir(tmp_path, config)
  assert capsys.readouterr().err == ""  # a kill before the first checkpoint
  (tmp_path / "checkpoints").mkdir()
  workdir.check_workdir(tmp_path, config)
  assert "network.json is missing, so that nothing tells if the images are the same" in capsys.readouterr().err
