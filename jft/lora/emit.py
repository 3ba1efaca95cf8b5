# SPDX-License-Identifier: Apache-2.0
"""How a product with an adapted weight is emitted: x W + scale (x A) B, in one of a few ways.

`factored`  y = x W + scale * (x A) B. Least memory, every derivative.
`merged`    y = x (W + scale * A B), formed for this one product and formed again in the backward pass; a custom_vjp
            gives dx through the merged weight and dA, dB through products of rank r: never a gradient of W's shape.
            Faster where thin matrix products are slow (XLA on CPU). No forward-mode derivative. In bfloat16 the sum
            would round most of a small update away: there W stays apart, as in `factored`, and only the gradients
            of A and B are formed this mode's way.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft import errors
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
    plan = _plan(x.ndim, view, w_on_left, params)
    if mode == "merged":
        return _by_hand(base, plan, x, view)
    return _factored(base, plan, x, view)


def _factored(base: Any, plan: "_Plan", x: jax.Array, view: views.View) -> jax.Array:
    y = base(x, view.w)
    return y + _low_rank(plan, x, view).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The labels of one product: those of x, of the result, and which factor meets x first."""

    x_labels: tuple[int, ...]
    wanted: tuple[int, ...]
    b_first: bool
    precision: Any
    preferred_element_type: Any

    def order(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Two things that belong to A and B, the one that meets x first in front."""
        return (b, a) if self.b_first else (a, b)


def _plan(ndim: int, view: views.View, w_on_left: bool, params: dict[str, Any]) -> _Plan:
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    if w_on_left:
        left, right, left_batch, right_batch = right, left, right_batch, left_batch
    x_labels = [-1 - i for i in range(ndim)]  # negative: its own; W's labels are positive
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        x_labels[i] = view.labels[j]
    summed = {view.labels[j] for j in right}
    batch = [view.labels[j] for j in right_batch]
    x_rest = [n for n in x_labels if n not in summed and n not in batch]
    w_rest = [n for n in view.labels if n not in summed and n not in batch]
    return _Plan(
        x_labels=tuple(x_labels),
        wanted=(*batch, *w_rest, *x_rest) if w_on_left else (*batch, *x_rest, *w_rest),
        b_first=not summed & set(view.a_labels),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _thin(
    plan: _Plan, x: jax.Array, first: jax.Array, view: views.View
) -> tuple[jax.Array, tuple[int, ...]]:
    """scale * x times the factor that meets it first, and its labels: RANK is among them."""
    first_labels, second_labels = plan.order(view.a_labels, view.b_labels)
    keep = (*plan.wanted, views.RANK, *second_labels)
    thin, labels = views.contract(
        x, plan.x_labels, first, first_labels, keep, precision=plan.precision
    )
    return view.scale * thin, labels


def _low_rank(plan: _Plan, x: jax.Array, view: views.View) -> jax.Array:
    """scale * (x A) B with the dimension order of the dot_general."""
    dtype = jnp.promote_types(x.dtype, view.w.dtype)
    first, second = plan.order(view.a.astype(dtype), view.b.astype(dtype))
    thin, labels = _thin(plan, x.astype(dtype), first, view)
    out, labels = views.contract(
        thin,
        labels,
        second,
        plan.order(view.a_labels, view.b_labels)[1],
        plan.wanted,
        precision=plan.precision,
        preferred_element_type=plan.preferred_element_type,
    )
    return views.arrange(out, labels, plan.wanted)


def _low_rank_pullback(
    plan: _Plan, x: jax.Array, view: views.View, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of A and B, given the gradient g of the product.

    Automatic differentiation would put the wide operand first in each of these products, and XLA on CPU would copy it
    transposed: 15 % of a step. Here the thin operand stands first, and only it is turned.
    """
    dtype = jnp.promote_types(x.dtype, view.w.dtype)
    x, g = x.astype(dtype), g.astype(dtype)
    first, second = plan.order(view.a.astype(dtype), view.b.astype(dtype))
    first_labels, second_labels = plan.order(view.a_labels, view.b_labels)
    thin, thin_labels = _thin(plan, x, first, view)
    contract = functools.partial(views.contract, precision=plan.precision)
    d_second, labels = contract(thin, thin_labels, g, plan.wanted, second_labels)
    d_second = views.arrange(d_second, labels, second_labels)
    keep = (*thin_labels, *first_labels)
    g_thin, labels = contract(g, plan.wanted, second, second_labels, keep)
    d_first, labels = contract(view.scale * g_thin, labels, x, plan.x_labels, first_labels)
    d_first = views.arrange(d_first, labels, first_labels)
    d_a, d_b = plan.order(d_first, d_second)
    return d_a.astype(view.a.dtype), d_b.astype(view.b.dtype)


def _by_hand(base: Any, plan: _Plan, x: jax.Array, view: views.View) -> jax.Array:
    """The product with a backward pass written out, which never forms the gradient of W."""
    form = jnp.finfo(view.w.dtype).bits >= 32

    def value(x: jax.Array, view: views.View) -> jax.Array:
        return base(x, view.merged()) if form else _factored(base, plan, x, view)

    def forward(x: Any, view: Any) -> tuple[jax.Array, Any]:  # leaves with .value and .perturbed
        if view.w.perturbed:
            raise errors.UserError(
                f"{view.path} is differentiated, but lora mode 'merged' gives adapters alone a gradient:"
                " use mode='factored'"
            )
        x, view = jax.tree.map(lambda leaf: leaf.value, (x, view), is_leaf=_is_primal)
        return value(x, view), (x, view)

    def backward(saved: Any, g: Any) -> tuple[jax.Array, views.View]:
        x, view = saved
        g = g if isinstance(g, jax.Array) else jnp.zeros(g.shape, g.dtype)  # a symbolic zero
        _, pull_x = jax.vjp(lambda x: value(x, view), x)
        d_a, d_b = _low_rank_pullback(plan, x, view, g)
        # W's is discarded: nobody differentiates it, or `forward` would have refused.
        return pull_x(g)[0], dataclasses.replace(view, w=jnp.zeros_like(view.w), a=d_a, b=d_b)

    product = jax.custom_vjp(value)
    product.defvjp(forward, backward, symbolic_zeros=True)
    return product(x, view)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def gather(x: Any, view: views.View, params: dict[str, Any]) -> jax.Array | None:
    """Rows of an adapted table at indices x (an embedding lookup); None when the gather is of another kind."""
    numbers = params["dimension_numbers"]
    if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.collapsed_slice_dims
    full = all(
        n == m
        for i, (n, m) in enumerate(zip(params["slice_sizes"], view.w.shape, strict=True))
        if i != axis
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
