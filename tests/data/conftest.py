"""A fixture that the data tests share."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from sapr_jax.errors import InputError


@pytest.fixture
def refused() -> Callable[..., contextlib.AbstractContextManager[None]]:
  """Expects an `InputError` of one line that contains every given text."""

  @contextlib.contextmanager
  def expect(*texts: str) -> Iterator[None]:
    with pytest.raises(InputError) as info:
      yield
    message = str(info.value)
    assert "\n" not in message
    for text in texts:
      assert text in message

  return expect
