"""Experiments: each file is one, over `default.py`, which names every field."""
