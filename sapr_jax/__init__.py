"""Structured pruning for JAX and Flax: a convolutional network made truly smaller and faster.

    import sapr_jax as sapr

    graph = sapr.trace_channels(model, variables, input_shape=(1, 32, 32, 3))
    scores = sapr.rank_within_groups(sapr.l2_norm(variables["params"], graph))
    masks = sapr.project_to_budget(graph, scores, sapr.macs_budget(graph, 0.5))
    small_model, small_variables = sapr.prune(model, variables, graph, masks)

The method is that of Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023;
docs/method.md leads from its equations to the code.
"""

import logging

import lazy_loader

# JAX tells programs that show what is logged for information, such as those of absl, that a TPU's library is missing,
# wherever there is no TPU.
logging.getLogger("jax._src.xla_bridge").addFilter(
  lambda record: record.levelno > logging.INFO or "Failed to open libtpu.so" not in record.getMessage()
)

# What is imported is in `__init__.pyi`, and each name when it is first used: the command line hears signals before JAX
# is there.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
