# SPDX-License-Identifier: Apache-2.0
"""The products that consume an adapted weight: dot_general, ragged_dot_general, and gather of rows."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.lora import emit, packed, views


@dataclasses.dataclass(frozen=True)
class _Dot:
    """The labels and parameters of one dot_general with W.

    Attributes:
      x_labels: of the other operand; its own are negative.
      y_labels: of the result.
      b_first: whether B meets x before A does.
      params: precision and the like of the equation.
      view: W and its factors; the arrays are taken from elsewhere.
    """

    x_labels: tuple[int, ...]
    y_labels: tuple[int, ...]
    b_first: bool
    params: Mapping[str, Any]
    view: views.View

    def order(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Two things that belong to A and B, the one that meets x first in front."""
        return (b, a) if self.b_first else (a, b)

    def parts(
        self, x: jax.Array, a: jax.Array, b: jax.Array
    ) -> tuple[views.Part, views.Part, views.Part]:
        """x, the factor that meets it and the other one, in the dtype of the product."""
        dtype = jnp.promote_types(x.dtype, self.view.w.dtype)
        first, second = self.order(
            views.Part(a.astype(dtype), self.view.a.labels),
            views.Part(b.astype(dtype), self.view.b.labels),
        )
        return views.Part(x.astype(dtype), self.x_labels), first, second

    def thin(self, x: views.Part, first: views.Part, second: views.Part) -> views.Part:
        """scale * x times the factor that meets it first; RANK is among its labels."""
        keep = (*self.y_labels, views.RANK, *second.labels)
        axes = _axes(x, first) if self.params["out_sharding"] is not None else None
        thin = views.contract(x, first, keep, axes=axes, precision=self.params["precision"])
        return views.Part(self.view.scale * thin.array, thin.labels)

    def low(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """scale * (x A) B with the dimension order of the dot_general."""
        part, first, second = self.parts(x, a, b)
        out = self.params["out_sharding"]
        out = views.contract(
            self.thin(part, first, second),
            second,
            self.y_labels,
            axes=None
            if out is None
            else (out.mesh, dict(zip(self.y_labels, out.spec, strict=False))),
            precision=self.params["precision"],
            preferred_element_type=self.params["preferred_element_type"],
        )
        return out.arrange(self.y_labels)

    def pullback(
        self, x: jax.Array, a: jax.Array, b: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients of A and B, given the gradient g of the product.

        Automatic differentiation would put the wide operand first in each of these products, and XLA on CPU would
        copy it transposed: 15 % of a step. Here the thin operand stands first, and only it is turned.
        """
        part, first, second = self.parts(x, a, b)
        wide = views.Part(g.astype(part.array.dtype), self.y_labels)
        contract = functools.partial(views.contract, precision=self.params["precision"])
        thin = self.thin(part, first, second)
        d_second = contract(thin, wide, second.labels).arrange(second.labels)
        g_thin = contract(wide, second, (*thin.labels, *first.labels))
        g_thin = views.Part(self.view.scale * g_thin.array, g_thin.labels)
        d_first = contract(g_thin, part, first.labels).arrange(first.labels)
        d_a, d_b = self.order(d_first, d_second)
        return d_a.astype(a.dtype), d_b.astype(b.dtype)


def _axes(x: views.Part, first: views.Part) -> tuple[Any, dict[int, Any]]:
    """The mesh, and over which of its axes each label's dimension is sharded."""
    axes: dict[int, Any] = {}
    for part in (first, x):
        sharding = jax.typeof(part.array).sharding
        axes.update(zip(part.labels, sharding.spec, strict=True))
    return sharding.mesh, axes


def _labels(
    view: views.View, ndim: int, contracted: Any, batched: Any
) -> tuple[tuple[int, ...], list[int], set[int]]:
    """The labels of an operand with `ndim` dimensions that meets W, those of the batch, and those summed over.

    `contracted` and `batched` are each (the operand's dimensions, W's).
    """
    labels = [-1 - i for i in range(ndim)]
    for i, j in zip((*contracted[0], *batched[0]), (*contracted[1], *batched[1]), strict=True):
        labels[i] = view.labels[j]
    batch = [view.labels[j] for j in batched[1]]
    return tuple(labels), batch, {view.labels[j] for j in contracted[1]}


def dot(view: views.View, ndim: int, w_on_left: bool, params: dict[str, Any]) -> emit.Product:
    """`dot_general` of W and an operand with `ndim` dimensions."""
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    if w_on_left:
        left, right, left_batch, right_batch = right, left, right_batch, left_batch
    x_labels, batch, summed = _labels(view, ndim, (left, right), (left_batch, right_batch))
    x_rest = [n for n in x_labels if n not in summed and n not in batch]
    w_rest = [n for n in view.labels if n not in summed and n not in batch]
    y_labels = (*batch, *w_rest, *x_rest) if w_on_left else (*batch, *x_rest, *w_rest)
    b_first = not summed & set(view.a.labels)
    one = _Dot(x_labels, y_labels, b_first, params, view)
    plain = functools.partial(lax.dot_general, **params)
    base = (lambda x, w: plain(w, x)) if w_on_left else plain
    return emit.Product(base, one.low, one.pullback, one.x_labels, one.y_labels)


def ragged(
    view: views.View, ndim: int, sizes: jax.Array, params: dict[str, Any]
) -> emit.Product | None:
    """`ragged_dot_general` with W as its right operand and one group for each of a batch dimension of W's.

    None for the other kinds: rows are ragged, not the contracted dimension.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    if len(numbers.rhs_group_dimensions) != 1 or params["group_offset"] is not None:
        return None
    group = view.labels[numbers.rhs_group_dimensions[0]]
    (rows,) = numbers.lhs_ragged_dimensions
    if (
        group not in view.a.labels
        or group not in view.b.labels
        or rows in numbers.dot_dimension_numbers[0][0]
    ):
        return None
    x_labels, batch, summed = _labels(view, ndim, *numbers.dot_dimension_numbers)
    rest = [n for n in (*x_labels, *view.labels) if n not in summed and n not in batch]
    y_labels = (*batch, *(n for n in rest if n != group))
    b_first = not summed & set(view.a.labels)
    row_label = x_labels[rows]
    options = {k: params[k] for k in ("precision", "preferred_element_type")}

    def times(x: views.Part, factor: views.Part, sizes: jax.Array) -> views.Part:
        shared = [n for n in x.labels if n in factor.labels]
        inner = [n for n in shared if n not in batch]
        where = lambda part, labels: [part.labels.index(n) for n in labels]  # noqa: E731
        dims = lax.RaggedDotDimensionNumbers(
            ((where(x, inner), where(factor, inner)), (where(x, batch), where(factor, batch))),
            [x.labels.index(row_label)],
            [factor.labels.index(group)],
        )
        y = lax.ragged_dot_general(x.array, factor.array, sizes, dims, **options)
        left_over = [n for n in (*x.labels, *factor.labels) if n not in shared and n != group]
        return views.Part(y, (*batch, *left_over))

    def low(x: jax.Array, a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, view.w.dtype)
        factors = [
            views.Part(a.astype(dtype), view.a.labels),
            views.Part(b.astype(dtype), view.b.labels),
        ]
        first, second = factors[::-1] if b_first else factors
        thin = times(views.Part(x.astype(dtype), x_labels), first, sizes)
        thin = views.Part((view.scale * thin.array).astype(dtype), thin.labels)
        return times(thin, second, sizes).arrange(y_labels)

    def base(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(x, w, sizes, numbers, **options)

    return emit.Product(base, low, None, x_labels, y_labels, (sizes,))


_GATHER = (
    "dimension_numbers",
    "slice_sizes",
    "unique_indices",
    "indices_are_sorted",
    "mode",
    "fill_value",
)


def gather(
    indices: jax.Array, view: views.View, params: dict[str, Any]
) -> jax.Array | views.View | None:
    """W's slices at indices.

    An array, as for rows of a table (an embedding lookup); a view where only batch dimensions are indexed (experts
    chosen per token); None where the gain would change what stands for slices out of bounds.
    """
    numbers, moving = params["dimension_numbers"], _moving(view, params)
    if not _fill_stays(view, moving, params):
        return None
    index_labels = tuple(views.fresh() for _ in range(indices.ndim - 1))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offset, index = (
        iter([n for i, n in enumerate(view.labels) if i not in gone]),
        iter(index_labels),
    )
    w = _taken(view.w, indices, moving, params)
    labels = tuple(next(offset) if i in numbers.offset_dims else next(index) for i in range(w.ndim))
    taken = view.each(lambda part: _places(part, view, indices, moving, index_labels, params))
    taken = dataclasses.replace(taken, w=w, labels=labels)
    if all(view.labels[i] in view.a.labels and view.labels[i] in view.b.labels for i in moving):
        return taken
    return taken.merged()


def _taken(w: Any, indices: jax.Array, moving: set[int], params: dict[str, Any]) -> Any:
    """The gather of W; of a packed one without dequantising it, where what its blocks run along is taken whole and stays."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    options: dict[str, Any] = {k: params[k] for k in _GATHER}
    short = packed.axes(w)
    # From the first packed dimension on all must stay as they are, and at the end.
    tail = range(min(short, default=w.ndim), w.ndim)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims, *moving}
    out_ndim = indices.ndim - 1 + len(numbers.offset_dims)
    stays = not gone & {*tail} and all(
        sizes[i] == w.shape[i] and i - w.ndim + out_ndim in numbers.offset_dims for i in tail
    )
    bounded = params["mode"] != lax.GatherScatterMode.FILL_OR_DROP  # codes have no fill value

    def each(x: jax.Array) -> jax.Array:
        own = tuple(x.shape[i] if i in tail else size for i, size in enumerate(sizes))
        with_own: dict[str, Any] = options | {"slice_sizes": own}
        return lax.gather(x, indices, **with_own)

    whole = lambda x: lax.gather(x, indices, **options)  # noqa: E731
    return packed.apply(w, whole, each=each if stays and bounded else None)


def _moving(view: views.View, params: dict[str, Any]) -> set[int]:
    """The dimensions of W along which the gather chooses.

    One that is taken whole has only one place to start, also where it is given an index: the batching rule of a
    dynamic slice gives one to every dimension.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    bounded = params["mode"] != lax.GatherScatterMode.FILL_OR_DROP  # there any index can leave W
    whole = {i for i, n in enumerate(view.w.shape) if sizes[i] == n and bounded}
    indexed = set(numbers.start_index_map)
    # Where nothing can move, one dimension stands for all.
    return (indexed - whole or set(sorted(indexed)[:1])) | set(numbers.operand_batching_dims)


def _fill_stays(view: views.View, moving: set[int], params: dict[str, Any]) -> bool:
    """Whether the gain leaves `fill_value` alone: it is 1 there if it is indexed alike, and 0 and NaN stay anyway."""
    if view.gain is None or params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return True
    fill = params["fill_value"]
    alike = {view.labels[i] for i in moving} <= set(view.gain.labels)
    return alike or fill is None or fill == 0 or fill != fill


def _places(
    part: views.Part,
    view: views.View,
    indices: jax.Array,
    moving: set[int],
    index_labels: tuple[int, ...],
    params: dict[str, Any],
) -> views.Part:
    """The same slices of a factor, with the labels of the indices if it has one of the moving dimensions."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    at = {i: part.labels.index(n) for i, n in enumerate(view.labels) if n in part.labels}
    columns = [c for c, i in enumerate(numbers.start_index_map) if i in moving and i in at]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batching = sorted((at[i], j) for i, j in pairs if i in at)
    collapsed = sorted(at[i] for i in numbers.collapsed_slice_dims if i in at)
    if not columns and not batching:
        return part.drop({part.labels[i] for i in collapsed})
    gone = {*collapsed, *(i for i, _ in batching)}
    rest = [n for i, n in enumerate(part.labels) if i not in gone]
    slice_sizes = list(part.array.shape)
    for i, j in at.items():
        slice_sizes[j] = sizes[i]
    first = len(index_labels)
    array = lax.gather(
        part.array,
        jnp.concatenate([indices[..., c : c + 1] for c in columns] or [indices[..., :0]], axis=-1),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(first, first + len(rest))),
            collapsed_slice_dims=tuple(collapsed),
            start_index_map=tuple(at[numbers.start_index_map[c]] for c in columns),
            operand_batching_dims=tuple(i for i, _ in batching),
            start_indices_batching_dims=tuple(j for _, j in batching),
        ),
        slice_sizes=slice_sizes,
        mode=params["mode"],
        # Out of bounds the base's slices are `fill_value`: the update must not add to it, nor the gain change it.
        fill_value=1 if part is view.gain else 0,
    )
    return views.Part(array, (*index_labels, *rest))
