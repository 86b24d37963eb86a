"""JAX's options for a while."""

import contextlib

import jax


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
