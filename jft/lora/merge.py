# SPDX-License-Identifier: Apache-2.0
"""Updates folded into the weights: inside a program (`add`), or for good, with a check of what survives (`merge`)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import errors, tree
from jft.lora import dora, layouts, spec


@dataclasses.dataclass(frozen=True)
class Survival:
    """How much of one leaf's update is left after rounding to the leaf's dtype.

    Attributes:
      relative: |update| / |W|.
      gain: the rounded update along the intended one; 1 is all of it.
      cosine: between the two; 1 is the same direction.
    """

    relative: float
    gain: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Merged:
    """Parameters with updates folded in.

    Attributes:
      params: the tree to use.
      report: what survived, for each adapted leaf.
      original: the leaves as they were, {path: array}; `unmerge` puts them back.
    """

    params: Any
    report: dict[str, Survival]
    original: dict[str, Any]


def delta(factors: spec.Factors) -> jax.Array:
    """scale * A B, with the leaf's shape, in the adapter's dtype."""
    letters = "abcdefghijklmnop"[: len(factors.layout)]
    batch, inputs, outputs = ("".join(x) for x in layouts.split(factors.layout, tuple(letters)))
    product = jnp.einsum(f"{batch}{inputs}r,{batch}r{outputs}->{letters}", factors.a, factors.b)
    return factors.scale * product


def updated(w: jax.Array, factors: spec.Factors) -> jax.Array:
    """The adapted leaf, in at least the adapter's precision: not yet rounded to the leaf's dtype."""
    w = tree.dense(w)
    total = w.astype(jnp.promote_types(w.dtype, factors.a.dtype)) + delta(factors)
    if factors.magnitude is None:
        return total
    letters = "abcdefghijklmnop"[: len(factors.layout)]
    batch, _, outputs = ("".join(x) for x in layouts.split(factors.layout, tuple(letters)))
    return jnp.einsum(f"{letters},{batch}{outputs}->{letters}", total, dora.gain(w, factors))


def add(params: Any, adapters: Mapping[str, spec.Factors]) -> Any:
    """The parameters with each update added, rounded once to the leaf's dtype. Can be jitted and differentiated."""
    spec.check(adapters, params)
    leaves = tree.flatten(params)
    return tree.replace(
        params,
        {path: updated(leaves[path], f).astype(leaves[path].dtype) for path, f in adapters.items()},
    )


def merge(
    params: Any,
    adapters: Mapping[str, spec.Factors],
    *,
    dtype: Any = None,
    min_cosine: float = 0.9,
) -> Merged:
    """The parameters with each update added for good.

    Where one array stands at two paths (a tied head) and only one is adapted, the two differ afterwards.

    Args:
      params: the base; it is not changed.
      adapters: {path: Factors}.
      dtype: of the adapted leaves afterwards; None keeps each one's own.
      min_cosine: refuse when a rounded update points elsewhere than this: bfloat16 keeps 0.66 of an update of 0.1 %
        of the weights, where the adapter kept apart loses nothing. 0 merges whatever is left.

    Raises:
      UserError: an adapter that fits no leaf or holds values that are not finite, or too little that survives.
    """
    spec.check(adapters, params)
    leaves = tree.flatten(params)
    done, report = {}, {}
    for path, factors in adapters.items():
        done[path], numbers = _rounded(leaves[path], factors, dtype or leaves[path].dtype)
        update, kept, along, weight = (float(x) for x in numbers)
        if not jnp.isfinite(jnp.asarray([update, kept, along])).all():
            raise errors.UserError(
                f"{path}: the update holds values that are not finite; nothing was merged"
            )
        zero = update == 0
        survival = Survival(
            relative=(update / weight) ** 0.5 if weight else float("inf"),
            gain=1.0 if zero else along / update,
            cosine=1.0 if zero else along / (update * kept) ** 0.5 if kept else 0.0,
        )
        if survival.cosine < min_cosine:
            raise errors.UserError(
                f"{path}: rounding to {jnp.dtype(dtype or leaves[path].dtype).name} leaves a cosine of"
                f" {survival.cosine:.2f} of this update, which is {survival.relative:.2%} of the weights: keep the"
                " adapter apart, merge with dtype=float32, or pass min_cosine=0; nothing was merged"
            )
        report[path] = survival
    original = {path: leaves[path] for path in adapters}
    return Merged(tree.replace(params, done), report, original)


@functools.partial(jax.jit, static_argnames="dtype")
def _rounded(w: jax.Array, factors: spec.Factors, dtype: Any) -> tuple[jax.Array, tuple]:
    """The merged leaf, and |D|^2, |D'|^2, <D, D'>, |W|^2 for the intended update D and the rounded one D'."""
    want = updated(w, factors)
    out = want.astype(dtype)
    wide = tree.dense(w).astype(want.dtype)
    intended, kept = want - wide, out.astype(want.dtype) - wide
    products = ((intended, intended), (kept, kept), (intended, kept), (wide, wide))
    return out, tuple(jnp.vdot(x, y) for x, y in products)


def unmerge(merged: Merged) -> Any:
    """The parameters before the merge, bit for bit: the kept leaves, not a subtraction."""
    return tree.replace(merged.params, merged.original)
