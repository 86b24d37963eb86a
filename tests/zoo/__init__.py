"""Networks of other packages, pruned by the plain call: `python -m tests.zoo` writes docs/supported.md."""
