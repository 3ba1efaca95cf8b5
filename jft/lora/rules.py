# SPDX-License-Identifier: Apache-2.0
"""What each primitive does to a view of an adapted weight: turn it into another view, or consume it in a product.

A rule takes (interpreter, equation, inputs) and gives the outputs, or None where no factors describe them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint, lax

from jft.lora import emit, packed, products, spec, views

Rule = Callable[[Any, Any, list[Any]], list[Any] | None]


def _view_first(rule: Callable) -> Callable:
    """A rule for primitives whose first operand is W and whose result is a view of it."""

    @functools.wraps(rule)
    def wrapped(_: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
        view, *rest = inputs
        if not isinstance(view, views.View) or any(isinstance(x, views.View) for x in rest):
            return None
        out = rule(view, *rest, **eqn.params)
        return None if out is None else out if isinstance(out, list) else [out]

    return wrapped


def _convert(view: views.View, *, new_dtype: Any, **_: Any) -> views.View | None:
    return views.cast(view, new_dtype) if jnp.issubdtype(new_dtype, jnp.floating) else None


def _same(view: views.View, **_: Any) -> views.View:
    return view


def _stop_gradient(view: views.View, **_: Any) -> views.View:
    return jax.tree.map(lax.stop_gradient, view)


def _transpose(view: views.View, *, permutation: Sequence[int]) -> views.View:
    return views.transpose(view, permutation)


def _squeeze(view: views.View, *, dimensions: Sequence[int]) -> views.View:
    return views.squeeze(view, dimensions)


def _reshape(view: views.View, *, new_sizes: Sequence[int], dimensions: Any, **_: Any) -> Any:
    return None if dimensions is not None else views.reshape(view, new_sizes)


def _broadcast(
    view: views.View, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any
) -> views.View | None:
    """Only new axes of size 1."""
    new = [i for i in range(len(shape)) if i not in broadcast_dimensions]
    kept = tuple(shape[i] for i in broadcast_dimensions)
    if kept != view.w.shape or any(shape[i] != 1 for i in new):
        return None
    return views.expand(view, new) if new else view


def _slice(view: views.View, *, start_indices: Any, limit_indices: Any, strides: Any) -> views.View:
    strides = strides or (1,) * view.w.ndim

    def cut(x: jax.Array, axis: int, i: int) -> jax.Array:
        return lax.slice_in_dim(x, start_indices[i], limit_indices[i], strides[i], axis)

    spans = zip(start_indices, limit_indices, strides, view.w.shape, strict=True)
    axes = [i for i, span in enumerate(spans) if span[:3] != (0, span[3], 1)]
    w = _cut(view.w, axes, cut)
    return views.slice_axes(view, w, axes, cut)


def _dynamic_slice(view: views.View, *starts: Any, slice_sizes: Any) -> views.View:
    def cut(x: jax.Array, axis: int, i: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, starts[i], slice_sizes[i], axis)

    axes = [i for i in range(view.w.ndim) if slice_sizes[i] != view.w.shape[i]]
    w = _cut(view.w, axes, cut)
    return views.slice_axes(view, w, axes, cut)


def _cut(w: Any, axes: Sequence[int], cut: Callable) -> Any:
    """W cut along some axes; cut(array, its axis, W's axis)."""

    def change(x: jax.Array) -> jax.Array:
        for i in axes:
            x = cut(x, i, i)
        return x

    return packed.apply(w, change, each=None if packed.axes(w) & {*axes} else change)


def _split(view: views.View, *, sizes: Sequence[int], axis: int) -> list[views.View]:
    out, start = [], 0
    for size in sizes:

        def cut(x: jax.Array, at: int, _: int, start: int = start, size: int = size) -> jax.Array:
            return lax.slice_in_dim(x, start, start + size, 1, at)

        out.append(views.slice_axes(view, _cut(view.w, [axis], cut), [axis], cut))
        start += size
    return out


def _negate(view: views.View) -> views.View:
    return views.scaled(view, lambda x: -x)


def _multiply(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """By a scalar only."""
    view, other = inputs if isinstance(inputs[0], views.View) else inputs[::-1]
    if isinstance(other, views.View) or jnp.ndim(other) != 0:
        return None
    return [views.scaled(view, lambda x: x * jnp.asarray(other, x.dtype))]


def _divide(view: views.View, other: Any) -> views.View | None:
    if jnp.ndim(other) != 0:
        return None
    return views.scaled(view, lambda x: x / jnp.asarray(other, x.dtype))


def _barrier(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(inputs)))


def _name(view: views.View, *, name: str) -> views.View:
    named = packed.apply(view.w, lambda w: ad_checkpoint.checkpoint_name(w, name))
    return dataclasses.replace(view, w=named)


def _round(view: views.View, *, exponent_bits: int, mantissa_bits: int) -> views.View:
    """As for a cast, the base is rounded and the factors keep their precision."""
    w = packed.apply(view.w, lambda w: lax.reduce_precision(w, exponent_bits, mantissa_bits))
    return dataclasses.replace(view, w=w)


def _constrain(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """W's sharding for W, and for each factor what of it concerns the factor's dimensions."""
    (view,) = inputs
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.NamedSharding) or eqn.params["unconstrained_dims"]:
        return None
    return [_sharded(view, sharding, lax.with_sharding_constraint)]


def _reshard(view: views.View, *, dst_sharding: Any, **_: Any) -> views.View:
    return _sharded(view, dst_sharding, jax.sharding.reshard)


def _sharded(view: views.View, to: jax.NamedSharding, move: Callable) -> views.View:
    axes = dict(zip(view.labels, (*to.spec, *(None,) * view.w.ndim), strict=False))

    def part(x: views.Part) -> views.Part:
        spec = jax.P(*(axes.get(n) for n in x.labels))
        return views.Part(move(x.array, jax.NamedSharding(to.mesh, spec)), x.labels)

    def to_place(w: jax.Array) -> jax.Array:
        return move(w, to)

    def each(w: jax.Array) -> jax.Array:
        """A short dimension that the mesh does not divide (of scales) is whole on every device."""
        return move(w, jax.NamedSharding(to.mesh, spec.divided(to.mesh, to.spec, w.shape)))

    return dataclasses.replace(view.each(part), w=packed.apply(view.w, to_place, each=each))


def _vary(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """W declared to vary over mesh axes. The factors follow by themselves where they meet what varies."""
    (view,) = inputs
    vary = lambda w: interpreter.plain(eqn, [w])[0]  # noqa: E731
    return [dataclasses.replace(view, w=packed.apply(view.w, vary, each=vary))]


def _all_gather(view: views.View, **params: Any) -> views.View | None:
    """The dimension is gathered in W and in the factors that have it."""
    axis = params["all_gather_dimension"]
    if not params["tiled"]:
        return None
    options = {k: params[k] for k in ("axis_index_groups", "tiled")}

    def gathered(x: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(x, params["axis_name"], axis=axis, **options)

    view_parts = view.each(lambda part: part.map(view.labels[axis], gathered))
    whole = lambda w: gathered(w, axis)  # noqa: E731
    return dataclasses.replace(view_parts, w=packed.apply(view.w, whole, each=whole))


def _dot(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    left, right = inputs
    if isinstance(left, views.View) and isinstance(right, views.View):
        return None
    w_on_left = isinstance(left, views.View)
    view, x = (left, right) if w_on_left else (right, left)
    return _consume(interpreter, eqn, products.dot(view, x.ndim, w_on_left, eqn.params), x, view)


def _ragged(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    x, view, sizes = inputs
    if isinstance(x, views.View) or not isinstance(view, views.View):
        return None
    return _consume(interpreter, eqn, products.ragged(view, x.ndim, sizes, eqn.params), x, view)


def _consume(
    interpreter: Any, eqn: Any, product: emit.Product | None, x: jax.Array, view: views.View
) -> list[Any] | None:
    if product is None:
        return None
    key = interpreter.fresh_key(x) if view.dropout else None
    y = emit.product(product, x, view, interpreter.mode, key)
    if y is None:
        return None
    interpreter.note(view, eqn, factored=True)
    return [y]


def _gather(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    view, indices = inputs
    out = products.gather(indices, view, eqn.params)
    if out is None:
        return None
    if not isinstance(out, views.View):
        interpreter.note(view, eqn, factored=True)
    return [out]


RULES: dict[str, Rule] = {
    "convert_element_type": _view_first(_convert),
    "copy": _view_first(_same),
    "copy_p": _view_first(_same),
    "stop_gradient": _view_first(_stop_gradient),
    "transpose": _view_first(_transpose),
    "squeeze": _view_first(_squeeze),
    "reshape": _view_first(_reshape),
    "broadcast_in_dim": _view_first(_broadcast),
    "slice": _view_first(_slice),
    "dynamic_slice": _view_first(_dynamic_slice),
    "split": _view_first(_split),
    "neg": _view_first(_negate),
    "mul": _multiply,
    "div": _view_first(_divide),
    "optimization_barrier": _barrier,
    "name": _view_first(_name),
    "reduce_precision": _view_first(_round),
    "sharding_constraint": _constrain,
    "reshard": _view_first(_reshard),
    "pvary": _vary,
    "pcast": _vary,
    "all_gather": _view_first(_all_gather),
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "gather": _gather,
}
