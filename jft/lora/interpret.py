# SPDX-License-Identifier: Apache-2.0
"""The transform: interprets a function's jaxpr and rewrites every use of an adapted leaf.

Equations that touch no adapted leaf are re-emitted as they are. Structural ones turn a view into a view
(`jft.lora.rules`), products consume it (`jft.lora.products`, emitted by `jft.lora.emit`), control flow is rebuilt with the public combinators
(`jft.lora.control`). Anything else would need W + scale * A B itself: an error, unless allowed.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
from jax import lax
from jax.extend import core, source_info_util

from jft import errors, tree
from jft.lora import control, emit, rules, spec, views


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
    """Evaluates jaxprs whose inputs may be views. Holds what is constant over one evaluation, and where it is."""

    def __init__(self, mode: str, allow: Sequence[str], key: jax.Array | None = None):
        self.mode = mode
        self.allow = allow
        self.uses: list[Use] = []
        self.places: list[str] = []  # of the equations around the one at hand, outermost first
        self.debug_info: Any = None  # of the jaxpr at hand
        self._key = key  # for dropout, of the loop step at hand
        self._draws = itertools.count()
        self._checked = True  # whether types say over which mesh axes a value varies

    def fresh_key(self, x: jax.Array) -> jax.Array | None:
        """A key for one use of one weight with x, another on each device whose x differs; None without dropout."""
        if self._key is None:
            return None
        if not self._checked:
            raise errors.UserError(
                "dropout inside shard_map needs check_vma=True: without it nothing says which devices hold the same x"
            )
        key = jax.random.fold_in(self._key, next(self._draws))
        for axis in sorted(views.varying(x)):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        return key

    def split_key(self, count: int | None) -> jax.Array | None:
        """A key for what lies within a loop, or `count` of them, one for each step."""
        if self._key is None:
            return None
        key = jax.random.fold_in(self._key, next(self._draws))
        return key if count is None else jax.random.split(key, count)

    @contextlib.contextmanager
    def keyed(self, key: jax.Array | None) -> Iterator[None]:
        """Within, keys come from this one."""
        outer, self._key = self._key, key
        try:
            yield
        finally:
            self._key = outer

    @contextlib.contextmanager
    def manual(self, *, checked: bool) -> Iterator[None]:
        """Within a shard_map that tracks, or does not, over which mesh axes values vary."""
        outer, self._checked = self._checked, checked and self._checked
        try:
            yield
        finally:
            self._checked = outer

    def closed(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        return self.run(jaxpr.jaxpr, jaxpr.consts, args)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The outputs of the jaxpr; those that are views of a weight are returned as views."""
        env: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        env.update(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        for eqn in jaxpr.eqns:
            self.debug_info = jaxpr.debug_info
            env.update(
                zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]), strict=True)
            )
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        if not any(isinstance(x, views.View) for x in inputs):
            return self.plain(eqn, inputs)
        rule = RULES.get(eqn.primitive.name)
        debug_info, noted = self.debug_info, len(self.uses)
        self.places.append(source_info_util.summarize(eqn.source_info))
        try:
            outputs = rule(self, eqn, inputs) if rule else None
        except views.Mixed:
            outputs = None
        self.debug_info = debug_info
        if outputs is None:
            del self.uses[noted:]  # those within, which come to nothing
            full = [self.materialize(x, eqn) if isinstance(x, views.View) else x for x in inputs]
            outputs = self.plain(eqn, full)
        self.places.pop()
        return outputs

    def plain(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
        """Evaluates one equation as it is, through a jaxpr of its own (which hides how primitives bind)."""
        variables = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        values = [
            x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, core.Literal)
        ]
        unique = dict(zip(variables, values, strict=True))
        jaxpr = core.Jaxpr((), list(unique), eqn.outvars, [eqn], eqn.effects, self.debug_info)
        return jax.core.eval_jaxpr(jaxpr, (), *unique.values())

    def note(self, view: views.View, eqn: Any, factored: bool) -> Use:
        # Library functions that are traced once and cached have no line of their own: take the caller's.
        source = next((place for place in reversed(self.places) if place), "an unknown line")
        use = Use(view.path, eqn.primitive.name, factored, source)
        if view.adapted:
            self.uses.append(use)
        return use

    def materialize(self, view: views.View, eqn: Any) -> jax.Array:
        use = self.note(view, eqn, factored=False)
        if view.adapted and not any(re.fullmatch(pattern, view.path) for pattern in self.allow):
            raise MaterializeError(
                f"{view.path} is used by {use.primitive} at {use.source}, which needs W + A B itself:"
                " take it out of the targets, or allow it with materialize=(pattern,)"
            )
        return view.merged()


RULES = rules.RULES | control.RULES


def transform(f: Callable, *, mode: str = "factored", materialize: Sequence[str] = ()) -> Callable:
    """LoRA for a function: `g(params, adapters, *args, **kwargs)` is f with W + scale * A B for each adapted W.

    Args:
      f: `f(params, *args, **kwargs)`, traceable by JAX; `params` any pytree of arrays. Where a leaf is quantised, f sees
        a dense array in its place, which is made only where a product needs it.
      mode: how products are emitted, see `jft.lora.emit`.
      materialize: patterns of paths for which forming W + scale * A B is allowed where no factors will do.

    Returns:
      g. It can be jitted, differentiated, vmapped (over adapters too) and sharded like f. With `dropout_key=`, a typed
      key, the inputs of low-rank products are dropped at the adapters' rates, differently for each use of a weight,
      step of a loop and row; without it, never.

    Raises:
      UserError, from g: an adapter that fits no leaf, or that f never uses.
      MaterializeError, from g: a use that cannot be factored, naming leaf, primitive and source line.
    """
    if mode not in emit.MODES:
        raise errors.UserError(f"lora mode {mode!r}: it must be one of {', '.join(emit.MODES)}")

    @functools.wraps(f)
    def g(
        params: Any,
        adapters: Mapping[str, spec.Factors],
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        interpreter = Interpreter(mode, materialize, dropout_key)
        return _evaluate(f, interpreter, params, adapters, args, kwargs)

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
    leaves, structure = jax.tree.flatten(inputs, is_leaf=tree.is_quantized)
    traced = [i for i, x in enumerate(leaves) if hasattr(x, "dtype") or isinstance(x, float)]

    def flat(*values: Any) -> Any:
        full = list(leaves)
        for i, value in zip(traced, values, strict=True):
            full[i] = value
        params, args, kwargs = jax.tree.unflatten(structure, full)
        return f(params, *args, **kwargs)

    # The function sees a dense array in a quantised one's place.
    values = [leaves[i] for i in traced]
    stand_ins = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) if tree.is_quantized(x) else x for x in values
    ]
    jaxpr, out_shape = jax.make_jaxpr(flat, return_shape=True)(*stand_ins)
    for i, path in enumerate(tree.flatten(params)):  # the parameters come first among the leaves
        if path in adapters:
            values[traced.index(i)] = views.make(path, leaves[i], adapters[path])
        elif tree.is_quantized(leaves[i]):
            values[traced.index(i)] = views.track(path, leaves[i])
    outputs = interpreter.closed(jaxpr, values)
    _finish(interpreter, jaxpr, outputs, adapters)
    return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)


def _finish(
    interpreter: Interpreter, jaxpr: Any, outputs: list[Any], adapters: Mapping[str, spec.Factors]
) -> None:
    """Views among the outputs are materialised (or refused); an adapter that nothing used is an error."""
    for i, x in enumerate(outputs):
        if isinstance(x, views.View):
            if x.adapted and not any(re.fullmatch(p, x.path) for p in interpreter.allow):
                raise MaterializeError(
                    f"{x.path} is returned by the function, which needs W + A B itself"
                )
            if x.adapted:
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
