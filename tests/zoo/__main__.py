"""Writes docs/supported.md."""

from tests.zoo.measured import PAGE, text

if __name__ == "__main__":
  PAGE.write_text(text())
