"""Surroundings of a run, usable by any other loop: devices, processes, interruption, progress, compiled programs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # see sapr_jax/__init__.py
