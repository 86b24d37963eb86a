"""A training step on virtual devices of the CPU: milliseconds on those that `XLA_FLAGS` asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

BATCH = 64


def measure_in_process(count: int) -> list[float]:
  """Measures in a process of its own, as the number of devices is fixed when JAX starts."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "benchmarks.virtual_devices"]
  return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(steps: int = 6) -> list[float]:
  """Times weight steps of ResNet-20 with regularization, on all devices of this process and without `fast_cpu`."""
  from benchmarks import training_pieces
  from benchmarks.measuring import time_in_turns

  made = training_pieces.pieces("resnet20", images=512)
  tx = training_pieces.weight_tx(made.graph)
  call = made.call(made.weight_step(tx), made.state(tx), BATCH, fast_cpu=False)
  return [round(1e3 * s, 1) for s in time_in_turns({"step": call}, rounds=steps)["step"]]


if __name__ == "__main__":
  print(json.dumps(measure()))
