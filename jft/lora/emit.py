# SPDX-License-Identifier: Apache-2.0
"""How a product with an adapted weight is emitted: x W + scale (x A) B, in one of a few ways.

`factored`  y = x W + scale * (x A) B. Least memory, every derivative.
`merged`    y = x (W + scale * A B), formed for this one product and formed again in the backward pass; a custom_vjp
            gives dx through the merged weight and dA, dB through products of rank r: never a gradient of W's shape.
            Faster where thin matrix products are slow (XLA on CPU). No forward-mode derivative. In bfloat16 the sum
            rounds most of a small update away, so a weight in less than float32 is emitted factored.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.lora import views

MODES = ("factored", "merged")


def dot(
    x: jax.Array, view: views.View, w_on_left: bool, params: dict[str, Any], mode: str
) -> jax.Array:
    """`dot_general` of x and an adapted W.

    Args:
      x: the other operand.
      view: W and its factors.
      w_on_left: whether W is the first operand.
      params: the parameters of the dot_general equation.
      mode: one of MODES.

    Returns:
      what `dot_general` would give with W + scale * A B in W's place.
    """
    plain = functools.partial(lax.dot_general, **params)
    base = (lambda x, w: plain(w, x)) if w_on_left else plain

    def low_rank(x: jax.Array, view: views.View) -> jax.Array:
        return _low_rank(x, view, w_on_left, params)

    if mode == "merged" and jnp.finfo(view.w.dtype).bits >= 32:
        return _merged(base, low_rank, x, view)
    y = base(x, view.w)
    return y + low_rank(x, view).astype(y.dtype)


def _low_rank(x: jax.Array, view: views.View, w_on_left: bool, params: dict[str, Any]) -> jax.Array:
    """scale * (x A) B with the dimension order of the dot_general."""
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    if w_on_left:
        left, right, left_batch, right_batch = right, left, right_batch, left_batch
    x_labels = [-1 - i for i in range(x.ndim)]  # negative: its own; W's labels are positive
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        x_labels[i] = view.labels[j]
    summed = {view.labels[j] for j in right}
    batch = [view.labels[j] for j in right_batch]
    x_rest = [n for n in x_labels if n not in summed and n not in batch]
    w_rest = [n for n in view.labels if n not in summed and n not in batch]
    wanted = (*batch, *w_rest, *x_rest) if w_on_left else (*batch, *x_rest, *w_rest)

    first, second = (view.a, view.a_labels), (view.b, view.b_labels)
    if not summed & set(view.a_labels):
        first, second = second, first
    dtype = jnp.promote_types(x.dtype, view.w.dtype)
    x, first_array, second_array = (v.astype(dtype) for v in (x, first[0], second[0]))
    keep = (*wanted, views.RANK, *second[1])
    thin, labels = views.contract(
        x, x_labels, first_array, first[1], keep, precision=params["precision"]
    )
    out, labels = views.contract(
        view.scale * thin,
        labels,
        second_array,
        second[1],
        wanted,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return views.arrange(out, labels, wanted)


def _merged(base: Any, low_rank: Any, x: jax.Array, view: views.View) -> jax.Array:
    """The merged product with a backward pass that never forms the gradient of W."""

    @jax.custom_vjp
    def product(x: jax.Array, view: views.View) -> jax.Array:
        return base(x, view.merged())

    def forward(x: jax.Array, view: views.View) -> tuple[jax.Array, Any]:
        return product(x, view), (x, view)

    def backward(saved: Any, g: jax.Array) -> tuple[jax.Array, views.View]:
        x, view = saved
        _, pull_x = jax.vjp(lambda x: base(x, view.merged()), x)
        factors = (view.a, view.b)
        _, pull_factors = jax.vjp(lambda f: low_rank(x, _with_factors(view, f)), factors)
        a, b = pull_factors(g.astype(jax.eval_shape(low_rank, x, view).dtype))[0]
        zero = jnp.zeros_like(
            view.w
        )  # W is frozen here: a caller who differentiates it must not use this mode
        return pull_x(g)[0], _with_factors(view, (a, b), w=zero)

    product.defvjp(forward, backward)
    return product(x, view)


def _with_factors(view: views.View, factors: Any, **changes: Any) -> views.View:

    return dataclasses.replace(view, a=factors[0], b=factors[1], **changes)


def gather(x: Any, view: views.View, params: dict[str, Any]) -> jax.Array | None:
    """Rows of an adapted table at indices x (an embedding lookup); None when the gather is of another kind."""
    numbers = params["dimension_numbers"]
    if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.collapsed_slice_dims
    full = all(
        n == m for i, (n, m) in enumerate(zip(params["slice_sizes"], view.w.shape)) if i != axis
    )
    if tuple(numbers.start_index_map) != (axis,) or not full:
        return None
    y = lax.gather(view.w, x, **_gather_params(params))
    return y + _gathered_update(x, view, axis, numbers, params, y.ndim).astype(y.dtype)


def _gather_params(params: dict[str, Any]) -> dict[str, Any]:
    return {
        k: params[k]
        for k in (
            "dimension_numbers",
            "slice_sizes",
            "unique_indices",
            "indices_are_sorted",
            "mode",
            "fill_value",
        )
    }


def _gathered_update(
    x: jax.Array, view: views.View, axis: int, numbers: Any, params: dict[str, Any], ndim: int
) -> jax.Array:
    """The same rows of scale * A B."""
    row = view.labels[axis]
    index_labels = [-1 - i for i in range(x.ndim - 1)]

    def rows(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        if row not in labels:
            return array, labels
        at = labels.index(row)
        moved = jnp.moveaxis(array, at, 0)
        offsets = tuple(range(x.ndim - 1, x.ndim - 1 + moved.ndim - 1))
        taken = lax.gather(
            moved,
            x,
            lax.GatherDimensionNumbers(offsets, (0,), (0,)),
            slice_sizes=(1, *moved.shape[1:]),
            mode=params["mode"],
            # Out of bounds rows are already `fill_value` in the base's rows; the update must not add to them.
            fill_value=0,
        )
        return taken, (*index_labels, *(n for n in labels if n != row))

    a, a_labels = rows(view.a, view.a_labels)
    b, b_labels = rows(view.b, view.b_labels)
    rest = [n for n in view.labels if n != row]
    wanted: list[int] = []
    offset, index = iter(rest), iter(index_labels)
    for i in range(ndim):
        wanted.append(next(offset) if i in numbers.offset_dims else next(index))
    dtype = jnp.promote_types(view.w.dtype, jnp.bfloat16)
    out, labels = views.contract(
        view.scale * a.astype(dtype), a_labels, b.astype(dtype), b_labels, wanted
    )
    return views.arrange(out, labels, wanted)
