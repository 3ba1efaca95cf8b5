# SPDX-License-Identifier: Apache-2.0
"""Views of an adapted weight: the array that the program sees, and the factors seen the same way.

Each dimension of W carries a label (an integer). A holds the labels of batch and inputs, B those of batch and
outputs, both hold RANK. Permuting W permutes labels; slicing a dimension slices the factors that carry its label.
So W + scale * A B viewed in any of these ways is W viewed, plus the product of factors viewed: it is never formed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.lora import spec

RANK = 0
_fresh = itertools.count(1)


class Mixed(Exception):
    """The operation would mix inputs with outputs: no factors describe its result."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b"],
    meta_fields=["labels", "a_labels", "b_labels", "scale", "path"],
)
@dataclasses.dataclass(frozen=True)
class View:
    """W as seen at one point of the program.

    Attributes:
      w: the base's array, as the untransformed program would have it.
      a, b: the factors, viewed alike; their axis order is free, `a_labels` and `b_labels` say what it is.
      labels: one label for each dimension of w.
      scale: the update is scale * sum over RANK of a * b.
      path: the leaf it comes from.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    labels: tuple[int, ...]
    a_labels: tuple[int, ...]
    b_labels: tuple[int, ...]
    scale: float
    path: str

    def map(self, label: int, f: Callable[[jax.Array, int], jax.Array]) -> "View":
        """The view with f(array, axis) applied to each factor that carries the label. `w` is left alone."""
        a = f(self.a, self.a_labels.index(label)) if label in self.a_labels else self.a
        b = f(self.b, self.b_labels.index(label)) if label in self.b_labels else self.b
        return dataclasses.replace(self, a=a, b=b)

    def delta(self) -> jax.Array:
        """scale * A B with the dimensions of w, in the factors' dtype."""
        product, labels = contract(self.a, self.a_labels, self.b, self.b_labels, self.labels)
        return self.scale * arrange(product, labels, self.labels)

    def merged(self) -> jax.Array:
        """W + scale * A B: what the program would see if the update were formed."""
        delta = self.delta()
        wide = jnp.promote_types(self.w.dtype, delta.dtype)
        return (self.w.astype(wide) + delta).astype(self.w.dtype)


def make(path: str, w: jax.Array, factors: spec.Factors) -> View:
    """The view of a whole leaf."""
    labels = tuple(next(_fresh) for _ in factors.layout)
    kinds = {
        letter: tuple(n for n, kind in zip(labels, factors.layout, strict=True) if kind == letter)
        for letter in "bio"
    }
    a_labels = (*kinds["b"], *kinds["i"], RANK)
    b_labels = (*kinds["b"], RANK, *kinds["o"])
    return View(w, factors.a, factors.b, labels, a_labels, b_labels, factors.scale, path)


def contract(
    x: jax.Array,
    x_labels: Sequence[int],
    y: jax.Array,
    y_labels: Sequence[int],
    keep: Sequence[int],
    **params: Any,
) -> tuple[jax.Array, tuple[int, ...]]:
    """One dot_general over the shared labels that are not kept; the result and its labels.

    Shared labels that are kept become batch dimensions. `params` go to `lax.dot_general`.
    """
    shared = [n for n in x_labels if n in y_labels]
    batch = [n for n in shared if n in keep]
    summed = [n for n in shared if n not in keep]
    numbers = (
        ([x_labels.index(n) for n in summed], [y_labels.index(n) for n in summed]),
        ([x_labels.index(n) for n in batch], [y_labels.index(n) for n in batch]),
    )
    rest = [n for n in (*x_labels, *y_labels) if n not in shared]
    return lax.dot_general(x, y, numbers, **params), (*batch, *rest)


def arrange(x: jax.Array, labels: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """x with its axes in the wanted order."""
    if tuple(labels) == tuple(wanted):
        return x
    return lax.transpose(x, [labels.index(n) for n in wanted])


def transpose(view: View, permutation: Sequence[int]) -> View:
    labels = tuple(view.labels[i] for i in permutation)
    return dataclasses.replace(view, w=lax.transpose(view.w, permutation), labels=labels)


def cast(view: View, dtype: jnp.dtype) -> View:
    """W in another float type. The factors keep theirs: they are cast where they are used."""
    return dataclasses.replace(view, w=view.w.astype(dtype))


def scaled(view: View, factor: jax.Array) -> View:
    """W times a scalar."""
    return dataclasses.replace(view, w=view.w * factor, b=view.b * factor.astype(view.b.dtype))


def squeeze(view: View, axes: Sequence[int]) -> View:
    """W without some axes of size 1."""
    axes = sorted(axes)
    gone = {view.labels[i] for i in axes}
    drop = lambda labels: tuple(n for n in labels if n not in gone)  # noqa: E731
    where = lambda labels: [i for i, n in enumerate(labels) if n in gone]  # noqa: E731
    return dataclasses.replace(
        view,
        w=lax.squeeze(view.w, axes),
        a=lax.squeeze(view.a, where(view.a_labels)),
        b=lax.squeeze(view.b, where(view.b_labels)),
        labels=drop(view.labels),
        a_labels=drop(view.a_labels),
        b_labels=drop(view.b_labels),
    )


def expand(view: View, axes: Sequence[int]) -> View:
    """W with new axes of size 1 at these places of the result. A carries them: size 1 mixes nothing."""
    axes = sorted(axes)
    new = {axis: next(_fresh) for axis in axes}
    labels = list(view.labels)
    for axis in axes:
        labels.insert(axis, new[axis])
    return dataclasses.replace(
        view,
        w=lax.expand_dims(view.w, axes),
        a=lax.expand_dims(view.a, range(len(axes))),
        labels=tuple(labels),
        a_labels=(*new.values(), *view.a_labels),
    )


def slice_axes(
    view: View, w: jax.Array, axes: Sequence[int], cut: Callable[[jax.Array, int, int], jax.Array]
) -> View:
    """The view of `w`, a slice of W; cut(array, its axis, W's axis) slices one axis of a factor."""
    for i in axes:
        view = view.map(view.labels[i], lambda x, axis, i=i: cut(x, axis, i))
    return dataclasses.replace(view, w=w)


def reshape(view: View, sizes: Sequence[int]) -> View:
    """W in another shape, each group of merged or split axes lying within one side.

    Raises:
      Mixed: an axis of the result would hold both inputs and outputs.
    """
    w = lax.reshape(view.w, sizes)
    view = squeeze(view, [i for i, n in enumerate(view.w.shape) if n == 1])
    new_sizes = [n for n in sizes if n != 1]
    labels: list[int] = []
    for old_axes, group in groups(view.w.shape, new_sizes):
        old = [view.labels[i] for i in old_axes]
        carriers = {(n in view.a_labels, n in view.b_labels) for n in old}
        if len(carriers) > 1:
            raise Mixed
        if len(old) == 1 and len(group) == 1:
            labels += old
            continue
        new = tuple(next(_fresh) for _ in group)
        view = dataclasses.replace(
            view,
            **_regroup("a", view.a, view.a_labels, old, new, group),
            **_regroup("b", view.b, view.b_labels, old, new, group),
        )
        labels += new
    view = dataclasses.replace(view, w=lax.reshape(w, new_sizes), labels=tuple(labels))
    ones = [i for i, n in enumerate(sizes) if n == 1]
    return dataclasses.replace(expand(view, ones) if ones else view, w=w)


def _regroup(
    name: str,
    x: jax.Array,
    labels: tuple[int, ...],
    old: list[int],
    new: tuple[int, ...],
    sizes: list[int],
) -> dict[str, object]:
    """A factor whose axes `old` are brought together and reshaped into `sizes`."""
    if old[0] not in labels:
        return {}
    rest = [n for n in labels if n not in old]
    x = arrange(x, labels, (*rest, *old))
    x = lax.reshape(x, (*x.shape[: len(rest)], *sizes))
    return {name: x, f"{name}_labels": (*rest, *new)}


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs (axes of old, sizes of new) with equal products. No size may be 1."""
    out, i, j = [], 0, 0
    while i < len(old):
        axes, sizes = [i], [new[j]]
        i, j = i + 1, j + 1
        while (have := math.prod(old[k] for k in axes)) != (want := math.prod(sizes)):
            if have < want:
                axes.append(i)
                i += 1
            else:
                sizes.append(new[j])
                j += 1
        out.append((axes, sizes))
    return out
