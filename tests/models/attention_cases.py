# SPDX-License-Identifier: Apache-2.0
"""Inputs of attention, and the work in a traced program, for the tests of this folder."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.models import architecture, attention


def config(
    heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **more: Any
) -> architecture.Config:
    sizes = {"vocab_size": 8, "d_model": 8, "num_layers": 1, "d_ff": 8, "max_length": 64}
    counts = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return architecture.Config(**sizes, **counts, **more)


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries start..start+T of packed rows of S keys."""

    T: int
    S: int
    start: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 2
    dtype: Any = jnp.float64

    @property
    def config(self) -> architecture.Config:
        return config(kv_heads=self.kv_heads, attention_softcap=self.softcap, sinks=self.sinks)

    def heads(self) -> list[jax.Array]:
        """q, k, v, and perhaps sinks: what there are gradients of."""
        random = np.random.default_rng(0)
        shapes = [(2, self.T, 4, 8), *[(2, self.S, self.kv_heads, 8)] * 2, (4,)]
        return [
            jnp.asarray(3 * random.normal(size=s), self.dtype) for s in shapes[: 3 + self.sinks]
        ]

    def segments(self) -> tuple[jax.Array, jax.Array]:
        """Two rows of three examples each and padding at the end."""
        random = np.random.default_rng(1)
        keys = np.zeros((2, self.S), np.int32)
        for row in keys:
            filled = self.S - self.S // 8
            row[:filled] = 1 + np.sort(random.integers(0, 3, filled))
        keys = jnp.asarray(keys)
        return keys[:, self.start : self.start + self.T], keys


def value_and_gradients(case: Case, *, traced: bool = False, **options: Any) -> list[jax.Array]:
    """What is attended, and the gradients of a product with it, zero in padding."""
    queries, keys = case.segments()
    weights = (
        np.random.default_rng(2).normal(size=(2, case.T, 4, 8)) * (queries > 0)[..., None, None]
    )

    def loss(heads: list[jax.Array], start: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v, *sinks = heads
        arrays = (q, k, v, queries, keys)
        out = attention.attend(
            case.config,
            *arrays,
            window=case.window,
            start=start,
            sinks_N=sinks[0] if sinks else None,
            **options,
        )
        return jnp.sum(out * weights), out

    run = jax.value_and_grad(loss, has_aux=True)
    if traced:
        (_, out), gradients = jax.jit(run)(case.heads(), jnp.int32(case.start))
    else:
        (_, out), gradients = jax.jit(functools.partial(run, start=case.start))(case.heads())
    return [out * (queries > 0)[..., None, None], *gradients]


def assert_same(case: Case, tolerance: float, **options: Any) -> None:
    """Equal to plain attention, each array up to a part of its largest number."""
    expected = value_and_gradients(case, implementation="plain")
    for got, wanted in zip(value_and_gradients(case, **options), expected, strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def each(jaxpr: Any, visit: Callable[[Any], int]) -> int:
    """The sum of `visit` over a program's equations, a loop's as often as they run, of branches the most.

    A call without results is left out, as the compiler does.
    """
    total = 0
    for equation in (e for e in jaxpr.eqns if e.outvars):
        inner = [
            each(getattr(sub, "jaxpr", sub), visit)
            for value in equation.params.values()
            for sub in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(sub, "jaxpr", sub), "eqns")
        ]
        name = equation.primitive.name
        within = max(inner, default=0) if name == "cond" else sum(inner)
        total += visit(equation) + within * equation.params.get("length", 1)
    return total


def product_flops(equation: Any) -> int:
    """Of one dot_general; 0 of anything else."""
    if equation.primitive.name != "dot_general":
        return 0
    contracted = equation.params["dimension_numbers"][0][0]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
