# SPDX-License-Identifier: Apache-2.0
"""Work on whole trees: the part that trains, several adapters at once, and what an adapter costs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import errors, tree
from jft.lora import spec


def split(params: Any, targets: str) -> tuple[Any, Any]:
    """(trainable, frozen): two trees like params, each with None where the other has its leaf.

    For leaves to train whole beside the adapters (norms, a new head): differentiate a function of the first that
    calls `join`.

    Args:
      params: a pytree.
      targets: a pattern over path names; it must match something, and nothing quantised.
    """
    leaves = tree.flatten(params)
    chosen = tree.match(targets, leaves, "targets")
    if packed := [path for path in chosen if tree.is_quantized(leaves[path])]:
        raise errors.UserError(f"split: {packed[0]} is quantised and cannot be trained whole")
    frozen = tree.replace(params, dict.fromkeys(chosen))
    return tree.replace(params, {path: None for path in leaves if path not in chosen}), frozen


def join(*parts: Any) -> Any:
    """The tree whose leaves are spread over the parts; each leaf in exactly one of them."""

    def only(*leaves: Any) -> Any:
        present = [x for x in leaves if x is not None]
        if len(present) != 1:
            raise errors.UserError(f"join: a leaf is in {len(present)} of the parts, not in one")
        return present[0]

    return jax.tree.map(only, *parts, is_leaf=lambda x: x is None or tree.is_quantized(x))


def stack(adapters: Sequence[Mapping[str, spec.Factors]]) -> spec.Adapters:
    """Several adapters of one base as one, with a leading axis on every factor, for `jax.vmap` over it.

    Smaller ranks are filled up with zeros; where scales differ the largest is kept and the ratio goes into B. The
    updates are the same.

    Raises:
      UserError: they adapt different leaves, or in different ways.
    """
    if not adapters:
        raise errors.UserError("stack: no adapters")
    first = adapters[0]
    for i, other in enumerate(adapters[1:], 1):
        if odd := first.keys() ^ other.keys():
            raise errors.UserError(
                f"stack: {min(odd)} is not adapted by both adapter 0 and adapter {i}"
            )
        for path, factors in other.items():
            if _kind(factors) != _kind(first[path]):
                raise errors.UserError(
                    f"stack: {path} has layout, DoRA and dropout {_kind(first[path])} in adapter 0 but"
                    f" {_kind(factors)} in adapter {i}"
                )
    return {path: _stacked([x[path] for x in adapters]) for path in first}


def _kind(factors: spec.Factors) -> tuple[str, bool, float]:
    return factors.layout, factors.magnitude is not None, factors.dropout


def _stacked(all_factors: Sequence[spec.Factors]) -> spec.Factors:
    rank = max(f.rank for f in all_factors)
    scale = max((f.scale for f in all_factors), key=abs)
    at = all_factors[0].layout.count("b")  # B's rank axis

    def fill(x: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x, pads)

    even = [
        dataclasses.replace(
            f,
            a=fill(f.a, f.a.ndim - 1),
            b=fill(f.b if f.scale == scale else f.b * (f.scale / scale), at),
            scale=scale,
        )
        for f in all_factors
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *even)


def unstack(adapters: Mapping[str, spec.Factors]) -> list[spec.Adapters]:
    """The adapters that `stack` put together; each has the largest rank and scale of them all."""
    counts = {x.shape[0] for x in jax.tree.leaves(adapters)}
    if len(counts) != 1:
        raise errors.UserError(f"unstack: the leading axes differ: {sorted(counts)}")
    return [jax.tree.map(lambda x, i=i: x[i], dict(adapters)) for i in range(counts.pop())]


@dataclasses.dataclass(frozen=True)
class Savings:
    """What adapters cost beside training everything. Counts of elements; bytes of float32 adapters.

    Attributes:
      total: elements of the base.
      trainable: elements of the adapters.
      by_path: elements of each leaf's adapter.
      adapter_bytes: of the adapter file.
      optimizer_bytes: of Adam's two moments for the adapters.
      full_optimizer_bytes: of Adam's two float32 moments for the whole base.
    """

    total: int
    trainable: int
    by_path: dict[str, int]
    adapter_bytes: int
    optimizer_bytes: int
    full_optimizer_bytes: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


def savings(s: spec.Spec, params: Any) -> Savings:
    """What the spec's adapters cost on this base, from shapes alone (`jax.ShapeDtypeStruct` will do)."""
    leaves = tree.flatten(params)
    by_path = {}
    for path, layout in spec.select(s, params).items():
        a, b, magnitude = spec.shapes(layout, leaves[path].shape, s.rank_of(path))
        by_path[path] = math.prod(a) + math.prod(b) + s.use_dora * math.prod(magnitude)
    total, trainable = tree.size(params), sum(by_path.values())
    return Savings(total, trainable, by_path, 4 * trainable, 8 * trainable, 8 * total)
