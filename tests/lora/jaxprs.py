# SPDX-License-Identifier: Apache-2.0
"""What a program computes, read from its jaxpr: shapes that would show that a merged weight was formed."""

from collections.abc import Iterator
from typing import Any

import jax

from jft import lora, tree


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, also of the jaxprs within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in whatever order: a transposed gradient is one too."""
    return tuple(sorted(n for n in shape if n > 1))


def forbidden(params: Any, adapters: lora.Adapters) -> set[tuple[int, ...]]:
    """The shapes of adapted leaves and, where these are stacked, of one layer."""
    shapes = set()
    leaves = tree.flatten(params)
    for path, factors in adapters.items():
        shapes.add(size(leaves[path].shape))
        shapes.add(size(leaves[path].shape[factors.layout.count("b") :]))
    return shapes


def formed(jaxpr: Any, shapes: set[tuple[int, ...]], *primitives: str) -> list[str]:
    return [
        str(eqn)
        for eqn in equations(jaxpr)
        if eqn.primitive.name in primitives and size(eqn.outvars[0].aval.shape) in shapes
    ]
