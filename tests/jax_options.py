"""JAX's options, for a while or for a process that a test starts."""

import contextlib
import os

import jax


def virtual_devices(count):
  """Returns what the environment of a process needs that is to find so many devices on the CPU."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@contextlib.contextmanager
def jax_options(**options):
  before = {name: jax.config.values[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
