"""First values of a network, without compiling the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun


def initialize(init: Callable[..., Any], *arguments: Any) -> Any:
  """Returns what `init(*arguments)` does, running only what the result needs.

  `model.init` evaluates the network too. Compiled as a whole, it has kernels for each parameter, which take a second to
  load even from the compilation cache. Here each initializer runs alone, compiled once for parameters of one shape.
  """
  closed, shapes = jax.make_jaxpr(init, return_shape=True)(*arguments)
  needed, equations = {result for result in closed.jaxpr.outvars if not isinstance(result, Literal)}, []
  for equation in reversed(closed.jaxpr.eqns):
    if not needed.isdisjoint(equation.outvars):
      equations.append(equation)
      needed.update(operand for operand in equation.invars if not isinstance(operand, Literal))
  program = closed.replace(jaxpr=closed.jaxpr.replace(eqns=equations[::-1]))
  return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(arguments)))
