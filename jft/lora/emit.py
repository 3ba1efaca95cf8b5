# SPDX-License-Identifier: Apache-2.0
"""How a product with an adapted weight is emitted: x W + scale (x A) B, in one of a few ways.

`factored`  y = x W + scale * (x A) B. Least memory, every derivative.
`hidden`    the same, with the low-rank term behind a custom_vjp that calls itself: a remat policy that saves products
            sees x W alone, where it would save a second array of y's size. No forward-mode derivative.
`merged`    y = x (W + scale * A B), formed for this one product and formed again in the backward pass; a custom_vjp
            gives dx through the merged weight and dA, dB through products of rank r: never a gradient of W's shape.
            Faster where thin matrix products are slow (XLA on CPU). No forward-mode derivative. In bfloat16 the sum
            would round most of a small update away: there W stays apart, as in `factored`, and only the gradients
            of A and B are formed this mode's way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft import errors
from jft.lora import packed, views

MODES = ("factored", "hidden", "merged")


@dataclasses.dataclass(frozen=True)
class Product:
    """One product with an adapted weight.

    Attributes:
      base: base(x, w, *others), the equation itself.
      low: low(x, a, b, *others) = scale * (x a) b, in base's dimension order.
      pullback: pullback(x, a, b, g) -> (da, db) of `low`, where there is a better way than automatic differentiation.
      x_labels: of x's dimensions; W's labels are positive, x's own negative.
      y_labels: of the result's dimensions.
      others: further operands, of integers. They are handed on, never closed over: a rule's backward pass is traced
        elsewhere than its forward pass, and in a scan what it closes over would have leaked.
    """

    base: Callable[..., jax.Array]
    low: Callable[..., jax.Array]
    pullback: Callable[..., tuple[jax.Array, jax.Array]] | None
    x_labels: tuple[int, ...]
    y_labels: tuple[int, ...]
    others: tuple[jax.Array, ...] = ()


def product(
    p: Product, x: jax.Array, view: views.View, mode: str, key: jax.Array | None
) -> jax.Array | None:
    """The product with gain * (W + scale * A B) in W's place; None where the gain allows no factors.

    Args:
      p: the product.
      x: the other operand.
      view: W and its factors.
      mode: one of MODES.
      key: for dropout; None = no dropout.
    """
    if not view.adapted:
        return packed.product(_base(p), x, view.w)
    after = None
    if view.gain is not None:
        summed = [n not in p.y_labels for n in view.gain.labels]
        if not any(summed):
            after = views.spread(view.gain, p.y_labels)
        elif all(n in p.x_labels for n in view.gain.labels):
            x = _times(x, views.spread(view.gain, p.x_labels))
        else:
            return None
    if key is not None and view.dropout:
        y = _apart(p, x, _dropped(x, view.dropout, key), view, mode)
    elif mode == "merged" and isinstance(view.w, packed.Packed):
        # Made dense for the rule, and made again for its backward pass.
        whole = lambda x, view: _merged(p, x, dataclasses.replace(view, w=view.w.dense()))  # noqa: E731
        y = jax.checkpoint(whole)(x, view)
    elif mode == "merged":
        y = _merged(p, x, view)
    else:
        y = _apart(p, x, x, view, mode)
    return y if after is None else _times(y, after)


def _times(x: jax.Array, gain: jax.Array) -> jax.Array:
    """x * gain, multiplied in the gain's precision."""
    return (x * gain).astype(x.dtype)


def _dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _apart(p: Product, x: jax.Array, low_x: jax.Array, view: views.View, mode: str) -> jax.Array:
    y = packed.product(_base(p), x, view.w)
    low = _hidden(p) if mode == "hidden" else p.low
    return y + low(low_x, view.a.array, view.b.array, *p.others).astype(y.dtype)


def _base(p: Product) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, w: p.base(x, w, *p.others)


def _hidden(p: Product) -> Callable[..., jax.Array]:
    """`p.low` as one opaque equation."""

    @jax.custom_vjp
    def low(*args: jax.Array) -> jax.Array:
        return p.low(*args)

    def backward(args: Any, g: jax.Array) -> tuple[Any, ...]:
        x, a, b, *others = args
        _, pull = jax.vjp(lambda x, a, b: p.low(x, a, b, *others), x, a, b)
        return (*pull(g), *(None for _ in others))

    # The forward rule calls the opaque function: differentiation inlines the rule, and would inline the products.
    low.defvjp(lambda *args: (low(*args), args), backward)
    return low


def _merged(p: Product, x: jax.Array, view: views.View) -> jax.Array:
    """The product with a backward pass written out, which never forms the gradient of W."""
    form = jnp.finfo(view.w.dtype).bits >= 32

    def value(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, *others: Any) -> jax.Array:
        if not form:
            y = p.base(x, w, *others)
            return y + p.low(x, a, b, *others).astype(y.dtype)
        a_part, b_part = views.Part(a, view.a.labels), views.Part(b, view.b.labels)
        whole = dataclasses.replace(view, w=w, a=a_part, b=b_part, gain=None).merged()
        return p.base(x, whole, *others)

    def forward(*args: Any) -> tuple[jax.Array, Any]:  # each with .value and .perturbed
        if args[1].perturbed:
            raise errors.UserError(
                f"{view.path} is differentiated, but lora mode 'merged' gives adapters alone a gradient:"
                " use mode='factored'"
            )
        values = tuple(arg.value for arg in args)
        return value(*values), values

    def backward(saved: Any, g: Any) -> tuple[Any, ...]:
        x, w, a, b, *others = saved
        g = g if isinstance(g, jax.Array) else jnp.zeros(g.shape, g.dtype)  # a symbolic zero
        dx = jax.vjp(lambda x: value(x, w, a, b, *others), x)[1](g)[0]
        if p.pullback is not None and _local(x):
            da, db = p.pullback(x, a, b, g)
        else:
            low, pull = jax.vjp(lambda a, b: p.low(x, a, b, *others), a, b)
            da, db = pull(g.astype(low.dtype))
        # W's is discarded: nobody differentiates it, or `forward` would have refused.
        return dx, jnp.zeros_like(w), da, db, *(None for _ in others)

    rule = jax.custom_vjp(value)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule(x, view.w, view.a.array, view.b.array, *p.others)


def _local(x: jax.Array) -> bool:
    """Whether x's type says nothing of a mesh: neither explicit shardings nor axes it varies over."""
    axis_types = jax.typeof(x).sharding.mesh.axis_types
    return not views.varying(x) and jax.sharding.AxisType.Explicit not in axis_types
