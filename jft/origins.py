# SPDX-License-Identifier: Apache-2.0
"""Where what is not finite comes from: a jaxpr evaluated equation by equation, each value with its origin.

A loop or a call is first run whole, compiled; it is looked into only where something that is not finite comes out of it,
a loop step by step: a model of 30 layers costs little more than its layer at fault. What is not finite but has no part in
the result (a masked logarithm of 0, say) is not blamed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from jft.lora import control

# Equations that only call what stands in them, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# What leaves an argument recognisable.
MOVES = (
    *("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice"),
    *("copy", "sharding_constraint", "optimization_barrier", "name"),
)
BACKWARD = "backward pass"
Words = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Value:
    """An array on its way, and what is known of it.

    Attributes:
      array: itself.
      nan, inf: whether it holds such values.
      origin: where they come from; None where they came in from outside.
      name: of the argument that it is, or is a part of.
    """

    array: Any
    nan: bool = False
    inf: bool = False
    origin: "Origin | None" = None
    name: str = ""

    @property
    def bad(self) -> bool:
        return self.nan or self.inf

    def __str__(self) -> str:
        text = f"{self.array.dtype.name}{list(self.array.shape)}"
        if jnp.issubdtype(self.array.dtype, jnp.number):
            nans, infs, low, high = (x.item() for x in _measure(self.array))
            kinds = ((nans, "nan"), (infs, "inf"))
            counts = [f"{count} of {self.array.size} {what}" for count, what in kinds if count]
            span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
            text = ", ".join([text, *counts, *([span] if low <= high else [])])
        return f"{self.name} ({text})" if self.name else text


@dataclasses.dataclass(frozen=True)
class Origin:
    """A place at which something that is not finite came about.

    Attributes:
      order: origins are numbered as they are found.
      eqn: the equation; of a step of a loop, the loop's.
      places: the loops around it, with their steps, and whether it is in the backward pass.
      inputs, outputs: its values.
      inside: evaluates what it consists of; None for an operation.
      prior: where the infinities that it took in come from.
    """

    order: int
    eqn: Any
    places: tuple[str, ...]
    inputs: list[Value] = dataclasses.field(repr=False)
    outputs: list[Value] = dataclasses.field(repr=False)
    inside: Callable[[], list[Value]] | None = dataclasses.field(repr=False)
    prior: "Origin | None" = dataclasses.field(repr=False)

    @property
    def source(self) -> str:
        return source_info_util.summarize(self.eqn.source_info)


class Search:
    """Evaluates jaxprs and keeps book of where what is not finite comes from."""

    def __init__(self, words: Words):
        self._words, self._count = words, 0

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value], places: tuple[str, ...]
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        env = dict(zip(jaxpr.constvars, looked_at(consts), strict=True))
        env |= zip(jaxpr.invars, values, strict=True)

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return looked_at([np.asarray(atom.val)])[0]
            return env[atom]

        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
        kept = set(_variables(jaxpr.outvars))
        for i, eqn in enumerate(jaxpr.eqns):
            inputs = [read(v) for v in eqn.invars]
            results = _evaluate(eqn, [x.array for x in inputs], jaxpr.debug_info)
            here = _direction(eqn, places)
            inside = self._inside(eqn, inputs, here)
            outputs = self._judge(eqn, here, inputs, results, inside)
            env |= zip(eqn.outvars, outputs, strict=True)
            for v in {*_variables(eqn.invars), *eqn.outvars} - kept:
                if last.get(v, i) == i:  # what nothing reads any more need not stay in memory
                    del env[v]
        return [read(v) for v in jaxpr.outvars]

    def _judge(
        self,
        eqn: Any,
        places: tuple[str, ...],
        inputs: list[Value],
        results: Sequence[Any],
        inside: Callable[[], list[Value]] | None,
    ) -> list[Value]:
        """The results, each with its origin: this equation, where it is not simply handed on."""
        outputs = looked_at(results)
        if eqn.primitive.name in MOVES and inputs[0].name:  # as it was given
            outputs = [dataclasses.replace(x, name=inputs[0].name) for x in outputs]
            if inputs[0].bad:
                return outputs
        prior = _earliest(inputs)
        own = Origin(self._count, eqn, places, inputs, outputs, inside, prior)
        self._count += 1
        judged = []
        for x in outputs:
            handed = [v for v in inputs if v.nan or (v.bad and not x.nan)]
            origin = _earliest(handed)
            # It came about here, or this is the first to use an argument that holds it.
            if not handed or (origin is None and any(v.name for v in handed)):
                origin = own
            judged.append(dataclasses.replace(x, origin=origin) if x.bad else x)
        return judged

    def resolve(self, origin: Origin | None) -> list[Origin]:
        """The operations behind an origin, the first one first."""
        if origin is None:
            return []
        before = self.resolve(origin.prior)
        within: list[Origin] = []
        if origin.inside is not None:
            found = zip(origin.outputs, origin.inside(), strict=True)
            within = self.resolve(_earliest([inner for x, inner in found if x.bad]))
        return before + (within or [origin])

    def _inside(
        self, eqn: Any, inputs: list[Value], places: tuple[str, ...]
    ) -> Callable[[], list[Value]] | None:
        # Within, only what comes about within is blamed.
        name, given = eqn.primitive.name, [dataclasses.replace(x, origin=None) for x in inputs]
        if name == "scan":
            return functools.partial(self._scan, eqn, given, places)
        if name == "while":
            return functools.partial(self._while, eqn, given, places)
        if name == "cond":
            return functools.partial(self._cond, eqn, given, places)
        if name in CALLS:
            called = eqn.params[CALLS[name]]
            consts = getattr(called, "consts", ())
            return functools.partial(
                self.run, getattr(called, "jaxpr", called), consts, given, places
            )
        return None

    def _cond(self, eqn: Any, inputs: list[Value], places: tuple[str, ...]) -> list[Value]:
        branches = eqn.params["branches"]
        chosen = branches[min(max(int(inputs[0].array), 0), len(branches) - 1)]
        return self.run(chosen.jaxpr, chosen.consts, inputs[1:], places)

    def _scan(self, eqn: Any, inputs: list[Value], places: tuple[str, ...]) -> list[Value]:
        params = eqn.params
        n_consts, n_carry = control.scan_counts(params)
        first = n_consts + n_carry
        consts, carry, xs = inputs[:n_consts], inputs[n_consts:first], inputs[first:]
        body, length = _Body(params["jaxpr"]), params["length"]
        ys: list[Value | None] = [None] * (len(eqn.outvars) - n_carry)
        for i in reversed(range(length)) if params["reverse"] else range(length):
            here = (*places, self._place(eqn, xs, i))
            given = [*consts, *carry, *(_part(x, i) for x in xs)]
            outputs = self._step(eqn, here, body, given)
            carry = outputs[:n_carry]
            ys = [a if a and a.bad else b for a, b in zip(ys, outputs[n_carry:], strict=True)]
        return [*carry, *(y for y in ys if y)]

    def _while(self, eqn: Any, inputs: list[Value], places: tuple[str, ...]) -> list[Value]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        goes_on, body = _Body(params["cond_jaxpr"]), _Body(params["body_jaxpr"])
        cond_consts, consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        carry, i = inputs[n_cond + n_body :], 0
        while goes_on([*cond_consts, *carry])[0]:
            here = (*places, self._place(eqn, [], i))
            carry, i = self._step(eqn, here, body, [*consts, *carry]), i + 1
        return carry

    def _step(
        self, eqn: Any, places: tuple[str, ...], body: "_Body", given: list[Value]
    ) -> list[Value]:
        """One step of a loop: what it hands on of the step before keeps its origin, but is not looked for within."""
        inner = [dataclasses.replace(x, origin=None) for x in given]
        inside = functools.partial(self.run, body.jaxpr.jaxpr, body.jaxpr.consts, inner, places)
        return self._judge(eqn, places, given, body(given), inside)

    def _place(self, eqn: Any, xs: Sequence[Value], i: int) -> str:
        for pattern, word in self._words:
            if any(re.search(pattern, x.name) for x in xs):
                return f"{word} {i}"
        return f"step {i} of the loop at {source_info_util.summarize(eqn.source_info)}"


class _Body:
    """A loop's body, compiled once."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr
        self._run = jax.jit(functools.partial(jax.core.eval_jaxpr, jaxpr.jaxpr, jaxpr.consts))

    def __call__(self, values: Sequence[Value]) -> list[Any]:
        return self._run(*(x.array for x in values))


def _direction(eqn: Any, places: tuple[str, ...]) -> tuple[str, ...]:
    backward = "transpose(" in str(
        eqn.source_info.name_stack
    )  # as jax names what differentiation adds
    return (*places, BACKWARD) if backward and BACKWARD not in places else places


def _evaluate(eqn: Any, arrays: Sequence[Any], debug_info: Any) -> Sequence[Any]:
    """One equation, through a jaxpr of its own (which hides how primitives bind); what holds others, compiled."""
    given = {
        v: x for v, x in zip(eqn.invars, arrays, strict=True) if not isinstance(v, core.Literal)
    }
    jaxpr = core.Jaxpr((), list(given), eqn.outvars, [eqn], eqn.effects, debug_info)
    run = functools.partial(jax.core.eval_jaxpr, jaxpr, ())
    compiled = any(True for _ in core.jaxprs_in_params(eqn.params))
    return (jax.jit(run) if compiled else run)(*given.values())


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def looked_at(arrays: Sequence[Any]) -> list[Value]:
    found = []
    for x in arrays:
        nan = inf = False
        if jnp.issubdtype(x.dtype, jnp.inexact):
            nan, inf = (bool(kind) for kind in _kinds(x))
        found.append(Value(x, nan, inf))
    return found


@jax.jit
def _kinds(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.isnan(x).any(), jnp.isinf(x).any()


@jax.jit
def _measure(x: jax.Array) -> tuple[jax.Array, ...]:
    """Numbers of NaN and infinities; the least and the greatest of the others."""
    good = jnp.isfinite(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (
        jnp.isnan(x).sum(),
        jnp.isinf(x).sum(),
        jnp.min(wide, initial=jnp.inf, where=good),
        jnp.max(wide, initial=-jnp.inf, where=good),
    )


def _earliest(values: Sequence[Value]) -> Origin | None:
    found = [x.origin for x in values if x.origin is not None]
    return min(found, key=lambda origin: origin.order, default=None)


def _part(x: Value, i: int) -> Value:
    """One step of what a scan goes over."""
    part = lax.dynamic_index_in_dim(x.array, np.int32(i), keepdims=False)
    return dataclasses.replace(looked_at([part])[0] if x.bad else Value(part), name=x.name)
