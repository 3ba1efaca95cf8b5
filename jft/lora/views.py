# SPDX-License-Identifier: Apache-2.0
"""Views of an adapted weight: the array that the program sees, and the factors seen the same way.

Each dimension of W carries a label (an integer). A holds the labels of batch and inputs, B those of batch and
outputs, both hold RANK. Permuting W permutes labels; slicing a dimension slices the factors that carry its label.
So gain * (W + scale * A B), viewed in any of these ways, is W viewed, and factors viewed: it is never formed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.lora import dora, layouts, packed, spec

RANK = 0
_labels = itertools.count(1)


def fresh() -> int:
    """A label that no other dimension has."""
    return next(_labels)


class Mixed(Exception):
    """The operation would mix inputs with outputs: no factors describe its result."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["labels"])
@dataclasses.dataclass(frozen=True)
class Part:
    """An array whose axes are known by label; their order is free."""

    array: jax.Array
    labels: tuple[int, ...]

    def arrange(self, wanted: Sequence[int]) -> jax.Array:
        """The array with its axes in this order."""
        if self.labels == tuple(wanted):
            return self.array
        return lax.transpose(self.array, [self.labels.index(n) for n in wanted])

    def front(self, label: int) -> jax.Array:
        """The array with the axis of this label first and the others in their order."""
        return self.arrange((label, *(n for n in self.labels if n != label)))

    def map(self, label: int, f: Callable[[jax.Array, int], jax.Array]) -> "Part":
        """f(array, axis) applied to the axis with this label, if there is one."""
        if label not in self.labels:
            return self
        return Part(f(self.array, self.labels.index(label)), self.labels)

    def drop(self, gone: set[int]) -> "Part":
        """Without the axes of these labels, which have size 1."""
        axes = [i for i, n in enumerate(self.labels) if n in gone]
        if not axes:
            return self
        kept = tuple(n for n in self.labels if n not in gone)
        return Part(lax.squeeze(self.array, axes), kept)

    def regroup(self, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]) -> "Part":
        """The axes `old` brought together and reshaped into `sizes`, which get the labels `new`."""
        if old[0] not in self.labels:
            return self
        rest = [n for n in self.labels if n not in old]
        array = self.arrange((*rest, *old))
        array = lax.reshape(array, (*array.shape[: len(rest)], *sizes))
        return Part(array, (*rest, *new))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "gain"],
    meta_fields=["labels", "scale", "dropout", "path"],
)
@dataclasses.dataclass(frozen=True)
class View:
    """W as seen at one point of the program: it stands for gain * (w + scale * sum over RANK of a b).

    Attributes:
      w: the base's array, as the untransformed program would have it; or the packed form of it.
      a, b: the factors, viewed alike.
      gain: DoRA's factor for each output, over some labels of batch and outputs; None without DoRA.
      labels: one label for each dimension of w.
      scale: a number.
      dropout: rate for the input of the low-rank product.
      path: the leaf it comes from.
    """

    w: Any
    a: Part
    b: Part
    gain: Part | None
    labels: tuple[int, ...]
    scale: float
    dropout: float
    path: str

    @property
    def adapted(self) -> bool:
        """False for a quantised leaf that is only tracked."""
        return self.a.array.shape[self.a.labels.index(RANK)] > 0

    def each(self, f: Callable[[Part], Part]) -> "View":
        """f applied to the factors and the gain. `w` is left alone."""
        gain = None if self.gain is None else f(self.gain)
        return dataclasses.replace(self, a=f(self.a), b=f(self.b), gain=gain)

    def delta(self) -> jax.Array:
        """scale * A B with the dimensions of w, in the factors' dtype."""
        return self.scale * contract(self.a, self.b, self.labels).arrange(self.labels)

    def merged(self) -> jax.Array:
        """What the program would see if the update were formed."""
        w = packed.dense(self.w)
        if not self.adapted:
            return w
        delta = self.delta()
        total = w.astype(jnp.promote_types(w.dtype, delta.dtype)) + delta
        if self.gain is not None:
            total = total * spread(self.gain, self.labels)
        return total.astype(w.dtype)


def make(path: str, w: jax.Array, factors: spec.Factors) -> View:
    """The view of a whole leaf."""
    labels = tuple(fresh() for _ in factors.layout)
    batch, inputs, outputs = layouts.split(factors.layout, labels)
    gain = None
    if factors.magnitude is not None:
        gain = Part(dora.gain(w, factors), (*batch, *outputs))
    return View(
        w=packed.pack(w),
        a=Part(factors.a, (*batch, *inputs, RANK)),
        b=Part(factors.b, (*batch, RANK, *outputs)),
        gain=gain,
        labels=labels,
        scale=factors.scale,
        dropout=factors.dropout,
        path=path,
    )


def track(path: str, w: Any) -> View:
    """The view of a quantised leaf that has no adapter: its update has rank 0, and any layout will do."""
    layout = "i" * (w.ndim - 1) + "o"
    a_shape, b_shape, _ = spec.shapes(layout, w.shape, rank=0)
    return make(path, w, spec.Factors(jnp.zeros(a_shape), jnp.zeros(b_shape), 0.0, layout))


def contract(
    x: Part,
    y: Part,
    keep: Sequence[int],
    *,
    axes: tuple[jax.sharding.Mesh, Mapping[int, Any]] | None = None,
    **params: Any,
) -> Part:
    """One dot_general over the shared labels that are not kept.

    Shared labels that are kept become batch dimensions. `axes` says how the result is sharded, where its type must say:
    the mesh, and each label's axes. `params` go to `lax.dot_general`.
    """
    shared = [n for n in x.labels if n in y.labels]
    batch = [n for n in shared if n in keep]
    summed = [n for n in shared if n not in keep]
    numbers = (
        ([x.labels.index(n) for n in summed], [y.labels.index(n) for n in summed]),
        ([x.labels.index(n) for n in batch], [y.labels.index(n) for n in batch]),
    )
    labels = (*batch, *(n for n in (*x.labels, *y.labels) if n not in shared))
    if axes is not None:
        mesh, of = axes
        params["out_sharding"] = jax.NamedSharding(mesh, jax.P(*(of.get(n) for n in labels)))
    return Part(lax.dot_general(x.array, y.array, numbers, **params), labels)


def spread(part: Part, labels: Sequence[int]) -> jax.Array:
    """A part with an axis for each of the labels, of size 1 for those it lacks: for broadcasting."""
    ordered = part.arrange([n for n in labels if n in part.labels])
    return lax.expand_dims(ordered, [i for i, n in enumerate(labels) if n not in part.labels])


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes that x varies over, inside a shard_map that tracks them."""
    kind: Any = jax.typeof(x)  # jax before 0.10 says `vma`
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def transpose(view: View, permutation: Sequence[int]) -> View:
    labels = tuple(view.labels[i] for i in permutation)
    w = packed.apply(view.w, lambda w: lax.transpose(w, permutation))
    return dataclasses.replace(view, w=w, labels=labels)


def cast(view: View, dtype: jnp.dtype) -> View:
    """W in another float type. The factors keep theirs: they are cast where they are used."""
    return dataclasses.replace(view, w=packed.cast(view.w, dtype))


def scaled(view: View, by: Callable[[jax.Array], jax.Array]) -> View:
    """W times a number: by(array) multiplies one."""
    b = Part(by(view.b.array).astype(view.b.array.dtype), view.b.labels)
    return dataclasses.replace(view, w=packed.apply(view.w, by), b=b)


def squeeze(view: View, axes: Sequence[int]) -> View:
    """W without some axes of size 1."""
    axes = sorted(axes)
    gone = {view.labels[i] for i in axes}
    view = view.each(lambda part: part.drop(gone))
    labels = tuple(n for n in view.labels if n not in gone)
    drop = lambda w: lax.squeeze(w, axes)  # noqa: E731
    before = max(axes, default=-1) < min(packed.axes(view.w), default=0)
    w = packed.apply(view.w, drop, each=drop if before else None)
    return dataclasses.replace(view, w=w, labels=labels)


def expand(view: View, axes: Sequence[int]) -> View:
    """W with new axes of size 1 at these places of the result. A carries them: size 1 mixes nothing."""
    axes = sorted(axes)
    new = {axis: fresh() for axis in axes}
    labels = list(view.labels)
    for axis in axes:
        labels.insert(axis, new[axis])
    a = Part(lax.expand_dims(view.a.array, range(len(axes))), (*new.values(), *view.a.labels))
    w = packed.apply(view.w, lambda w: lax.expand_dims(w, axes))
    return dataclasses.replace(view, w=w, a=a, labels=tuple(labels))


def slice_axes(
    view: View, w: Any, axes: Sequence[int], cut: Callable[[jax.Array, int, int], jax.Array]
) -> View:
    """The view of `w`, a slice of W; cut(array, its axis, W's axis) slices one axis of a factor."""
    for i in axes:
        label = view.labels[i]
        view = view.each(
            lambda part, i=i, label=label: part.map(label, lambda x, axis: cut(x, axis, i))
        )
    return dataclasses.replace(view, w=w)


def reshape(view: View, sizes: Sequence[int]) -> View:
    """W in another shape, each group of merged or split axes lying within one side.

    Raises:
      Mixed: an axis of the result would hold both inputs and outputs.
    """
    w = packed.apply(view.w, lambda w: lax.reshape(w, sizes))
    view = squeeze(view, [i for i, n in enumerate(view.w.shape) if n == 1])
    new_sizes = [n for n in sizes if n != 1]
    labels: list[int] = []
    for old_axes, group in groups(view.w.shape, new_sizes):
        old = [view.labels[i] for i in old_axes]
        if len({(n in view.a.labels, n in view.b.labels) for n in old}) > 1:
            raise Mixed
        if len(old) == 1 and len(group) == 1:
            labels += old
            continue
        new = tuple(fresh() for _ in group)
        view = view.each(lambda part, old=old, new=new, to=group: part.regroup(old, new, to))
        labels += new
    squeezed = packed.apply(w, lambda w: lax.reshape(w, new_sizes))
    view = dataclasses.replace(view, w=squeezed, labels=tuple(labels))
    ones = [i for i, n in enumerate(sizes) if n == 1]
    return dataclasses.replace(expand(view, ones) if ones else view, w=w)


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
