# SPDX-License-Identifier: Apache-2.0
"""The transform: interprets a function's jaxpr and rewrites every use of an adapted leaf.

Equations that touch no adapted leaf are re-emitted as they are. Structural ones turn a view into a view
(`jft.lora.views`), products consume it (`jft.lora.emit`), control flow is rebuilt with the public combinators, into
which views pass as pytrees. Anything else would need W + scale * A B itself: an error, unless allowed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from jft import errors, tree
from jft.lora import emit, spec, views


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of an adapted leaf: by which primitive, whether factored, and where in the user's source."""

    path: str
    primitive: str
    factored: bool
    source: str


class MaterializeError(errors.UserError):
    """A use of an adapted weight that needs W + scale * A B itself."""


class Interpreter:
    """Evaluates jaxprs whose inputs may be views. Holds what is constant over one evaluation."""

    def __init__(self, mode: str, allow: Sequence[str]):
        self.mode = mode
        self.allow = allow
        self.uses: list[Use] = []
        self.places: list[str] = []  # of the equations around the one at hand, outermost first

    def closed(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        return self.run(jaxpr.jaxpr, jaxpr.consts, args)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The outputs of the jaxpr; those that are views of a weight are returned as views."""
        env: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        env.update(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self.equation(eqn, inputs, jaxpr.debug_info)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any], debug_info: Any) -> list[Any]:
        if not any(isinstance(x, views.View) for x in inputs):
            return plain(eqn, inputs, debug_info)
        rule = RULES.get(eqn.primitive.name)
        self.places.append(source_info_util.summarize(eqn.source_info))
        try:
            outputs = rule(self, eqn, inputs) if rule else None
        except views.Mixed:
            outputs = None
        if outputs is None:
            full = [self.materialize(x, eqn) if isinstance(x, views.View) else x for x in inputs]
            outputs = plain(eqn, full, debug_info)
        self.places.pop()
        return outputs

    def note(self, view: views.View, eqn: Any, factored: bool) -> Use:
        # Library functions that are traced once and cached have no line of their own: take the caller's.
        source = next((place for place in reversed(self.places) if place), "an unknown line")
        use = Use(view.path, eqn.primitive.name, factored, source)
        self.uses.append(use)
        return use

    def materialize(self, view: views.View, eqn: Any) -> jax.Array:
        use = self.note(view, eqn, factored=False)
        if not any(re.fullmatch(pattern, view.path) for pattern in self.allow):
            raise MaterializeError(
                f"{view.path} is used by {use.primitive} at {use.source}, which needs W + A B itself:"
                " take it out of the targets, or allow it with materialize=(pattern,)"
            )
        return view.merged()


def plain(eqn: Any, inputs: Sequence[Any], debug_info: Any) -> list[Any]:
    """Evaluates one equation as it is, through a jaxpr of its own (which hides how primitives bind)."""
    variables = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    values = [x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, core.Literal)]
    unique = dict(zip(variables, values, strict=True))
    jaxpr = core.Jaxpr((), list(unique), eqn.outvars, [eqn], eqn.effects, debug_info)
    return jax.core.eval_jaxpr(jaxpr, (), *unique.values())


def _view_first(rule: Callable) -> Callable:
    """A rule for primitives whose first operand is W and whose result is a view of it."""

    @functools.wraps(rule)
    def wrapped(_: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
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

    w = lax.slice(view.w, start_indices, limit_indices, strides)
    axes = [i for i in range(view.w.ndim) if w.shape[i] != view.w.shape[i] or strides[i] != 1]
    return views.slice_axes(view, w, axes, cut)


def _dynamic_slice(view: views.View, *starts: Any, slice_sizes: Any) -> views.View:
    def cut(x: jax.Array, axis: int, i: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, starts[i], slice_sizes[i], axis)

    w = lax.dynamic_slice(view.w, starts, slice_sizes)
    axes = [i for i in range(view.w.ndim) if slice_sizes[i] != view.w.shape[i]]
    return views.slice_axes(view, w, axes, cut)


def _split(view: views.View, *, sizes: Sequence[int], axis: int) -> list[views.View]:
    out, start = [], 0
    for size in sizes:

        def cut(x: jax.Array, at: int, _: int, start: int = start, size: int = size) -> jax.Array:
            return lax.slice_in_dim(x, start, start + size, 1, at)

        out.append(views.slice_axes(view, cut(view.w, axis, axis), [axis], cut))
        start += size
    return out


def _negate(view: views.View) -> views.View:
    return dataclasses.replace(view, w=-view.w, b=-view.b)


def _multiply(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """By a scalar only."""
    view, other = inputs if isinstance(inputs[0], views.View) else inputs[::-1]
    if isinstance(other, views.View) or jnp.ndim(other) != 0:
        return None
    return [views.scaled(view, jnp.asarray(other))]


def _dot(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    left, right = inputs
    if isinstance(left, views.View) and isinstance(right, views.View):
        return None
    w_on_left = isinstance(left, views.View)
    view, x = (left, right) if w_on_left else (right, left)
    interpreter.note(view, eqn, factored=True)
    return [emit.dot(x, view, w_on_left, eqn.params, interpreter.mode)]


def _gather(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    view, indices = inputs
    if not isinstance(view, views.View):
        return None
    out = emit.gather(indices, view, eqn.params)
    if out is None:
        return None
    interpreter.note(view, eqn, factored=True)
    return [out]


def _inline(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any]:
    return interpreter.closed(eqn.params["jaxpr"], inputs)


def _remat(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any]:
    jaxpr = eqn.params["jaxpr"]
    body = lambda *args: interpreter.run(jaxpr, (), args)  # noqa: E731
    out = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(
        *inputs
    )
    return _forwarded(jaxpr, inputs, out)


def _forwarded(jaxpr: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """The outputs, with those that are just an input taken from outside (a view must not pass through)."""
    given = dict(zip(jaxpr.invars, inputs, strict=True))
    return [
        given.get(v, out) if not isinstance(v, core.Literal) else out
        for v, out in zip(jaxpr.outvars, outputs, strict=True)
    ]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of constants and carries of a scan equation; jax 0.12 says them in another way than 0.10."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def _scan(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    params, jaxpr = eqn.params, eqn.params["jaxpr"].jaxpr
    n_consts, n_carry = scan_counts(params)
    first_x = n_consts + n_carry
    is_view = [isinstance(x, views.View) for x in inputs]
    for i in range(n_carry):  # a view in the carry must come back unchanged: then it is a constant
        if is_view[n_consts + i] and jaxpr.outvars[i] is not jaxpr.invars[n_consts + i]:
            return None
    looped = [i for i in range(n_consts, first_x) if not is_view[i]]
    fixed = {i: inputs[i] for i in range(first_x) if i not in looped}
    xs = [_scanned(x) for x in inputs[first_x:]]

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        args = [fixed.get(i) for i in range(first_x)]
        for i, value in zip(looped, carry, strict=True):
            args[i] = value
        args += [join(part) for part, (_, join) in zip(x, xs, strict=True)]
        out = interpreter.closed(params["jaxpr"], args)
        carry = [out[i - n_consts] for i in looped]
        # What is only passed on is taken from outside afterwards; a view made inside has no outside.
        ys = [None if isinstance(y, views.View) else y for y in out[n_carry:]]
        return carry, ys

    carry, ys = lax.scan(
        body,
        [inputs[i] for i in looped],
        [part for part, _ in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    done = dict(zip(looped, carry, strict=True))
    out = [done.get(i, fixed.get(i)) for i in range(n_consts, first_x)]
    given = dict(zip(jaxpr.invars[first_x:], inputs[first_x:], strict=True))
    for variable, y in zip(jaxpr.outvars[n_carry:], ys, strict=True):
        if y is None and variable not in given:
            return None
        out.append(given[variable] if y is None else y)
    return out


def _scanned(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What to scan over for one input, and how the body makes its argument from one step of it."""
    if not isinstance(x, views.View):
        return x, lambda part: part
    label = x.labels[0]
    fixed: dict[str, Any] = {}
    moving: dict[str, Any] = {"w": x.w}
    changes: dict[str, Any] = {"labels": x.labels[1:]}
    for name, array, labels in (("a", x.a, x.a_labels), ("b", x.b, x.b_labels)):
        if label in labels:
            moving[name] = jnp.moveaxis(array, labels.index(label), 0)
            changes[f"{name}_labels"] = tuple(n for n in labels if n != label)
        else:
            fixed[name] = array
    return moving, lambda part: dataclasses.replace(x, **fixed, **part, **changes)


def _while(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    carry = inputs[n_cond + n_body :]
    jaxpr = params["body_jaxpr"].jaxpr
    fixed = {i: x for i, x in enumerate(carry) if isinstance(x, views.View)}
    if any(jaxpr.outvars[i] is not jaxpr.invars[n_body + i] for i in fixed):
        return None
    looped = [i for i in range(len(carry)) if i not in fixed]

    def full(values: Sequence[Any]) -> list[Any]:
        args = [fixed.get(i) for i in range(len(carry))]
        for i, value in zip(looped, values, strict=True):
            args[i] = value
        return args

    def cond(values: Sequence[Any]) -> Any:
        return interpreter.closed(params["cond_jaxpr"], [*cond_consts, *full(values)])[0]

    def body(values: Sequence[Any]) -> list[Any]:
        out = interpreter.closed(params["body_jaxpr"], [*body_consts, *full(values)])
        return [out[i] for i in looped]

    return full(lax.while_loop(cond, body, [carry[i] for i in looped]))


def _cond(interpreter: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    index, *operands = inputs
    branches = eqn.params["branches"]
    if any(isinstance(x, views.View) for x in _passed_on(branches, operands)):
        return None
    calls = [lambda args, branch=branch: interpreter.closed(branch, args) for branch in branches]
    return lax.switch(index, calls, operands)


def _passed_on(branches: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Operands that some branch returns as they are."""
    out = []
    for branch in branches:
        given = dict(zip(branch.jaxpr.invars, operands, strict=True))
        out += [given.get(v) for v in branch.jaxpr.outvars if not isinstance(v, core.Literal)]
    return out


RULES: dict[str, Callable[[Interpreter, Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _view_first(_convert),
    "copy": _view_first(_same),
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
    "dot_general": _dot,
    "gather": _gather,
    "jit": _inline,
    "closed_call": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def transform(f: Callable, *, mode: str = "factored", materialize: Sequence[str] = ()) -> Callable:
    """LoRA for a function: `g(params, adapters, *args, **kwargs)` is f with W + scale * A B for each adapted W.

    Args:
      f: `f(params, *args, **kwargs)`, traceable by JAX; `params` any pytree of arrays.
      mode: how products are emitted, see `jft.lora.emit`.
      materialize: patterns of paths for which forming W + scale * A B is allowed where no factors will do.

    Returns:
      g. It can be jitted, differentiated, vmapped (over adapters too) and sharded like f.

    Raises:
      UserError, from g: an adapter that fits no leaf, or that f never uses.
      MaterializeError, from g: a use that cannot be factored, naming leaf, primitive and source line.
    """
    if mode not in emit.MODES:
        raise errors.UserError(f"lora mode {mode!r}: it must be one of {', '.join(emit.MODES)}")

    @functools.wraps(f)
    def g(params: Any, adapters: Mapping[str, spec.Factors], *args: Any, **kwargs: Any) -> Any:
        return _evaluate(f, Interpreter(mode, materialize), params, adapters, args, kwargs)

    return g


def _evaluate(
    f: Callable,
    interpreter: Interpreter,
    params: Any,
    adapters: Mapping[str, spec.Factors],
    args: Any,
    kwargs: Any,
) -> Any:
    spec.check(adapters, params)
    inputs = (params, args, kwargs)
    # What is no array (a string, a flag) is fixed, as for any function that jax.make_jaxpr traces.
    leaves, structure = jax.tree.flatten(inputs)
    traced = [i for i, x in enumerate(leaves) if hasattr(x, "dtype") or isinstance(x, float)]

    def flat(*values: Any) -> Any:
        full = list(leaves)
        for i, value in zip(traced, values, strict=True):
            full[i] = value
        params, args, kwargs = jax.tree.unflatten(structure, full)
        return f(params, *args, **kwargs)

    jaxpr, out_shape = jax.make_jaxpr(flat, return_shape=True)(*(leaves[i] for i in traced))
    values = [leaves[i] for i in traced]
    for i, path in enumerate(tree.flatten(params)):  # the parameters come first among the leaves
        if path in adapters:
            values[traced.index(i)] = views.make(path, leaves[i], adapters[path])
    outputs = interpreter.closed(jaxpr, values)
    _finish(interpreter, jaxpr, outputs, adapters)
    return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)


def _finish(
    interpreter: Interpreter, jaxpr: Any, outputs: list[Any], adapters: Mapping[str, spec.Factors]
) -> None:
    """Views among the outputs are materialised (or refused); an adapter that nothing used is an error."""
    for i, x in enumerate(outputs):
        if isinstance(x, views.View):
            if not any(re.fullmatch(pattern, x.path) for pattern in interpreter.allow):
                raise MaterializeError(
                    f"{x.path} is returned by the function, which needs W + A B itself"
                )
            interpreter.uses.append(Use(x.path, "return", False, ""))
            outputs[i] = x.merged()
    used = {use.path for use in interpreter.uses}
    if unused := [path for path in adapters if path not in used]:
        raise errors.UserError(f"{', '.join(unused)}: adapted, but the function never uses it")


def explain(
    f: Callable,
    params: Any,
    adapters: Mapping[str, spec.Factors],
    *args: Any,
    materialize: Sequence[str] = (".*",),
    **kwargs: Any,
) -> list[Use]:
    """How each use of an adapted leaf in f comes out: factored or materialised, by which primitive, where."""
    interpreter = Interpreter("factored", materialize)
    run = functools.partial(_evaluate, f, interpreter)
    jax.eval_shape(lambda p, a, x, k: run(p, a, x, k), params, adapters, args, kwargs)
    return list(dict.fromkeys(interpreter.uses))
