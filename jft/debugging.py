# SPDX-License-Identifier: Apache-2.0
"""Finds the first operation of a function whose result is not finite: through jit, remat, scans, LoRA and gradients.

The function's jaxpr is evaluated equation by equation. A loop or a call is first run whole, compiled; it is looked into
only where something that is not finite comes out of it, a loop step by step: a model of 30 layers costs little more than
its layer at fault. What is not finite but has no part in the result (a masked logarithm of 0, say) is not blamed.
"""

import collections
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from jft import hosts, step
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
      places: the loops around it, with their steps.
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

    @property
    def backward(self) -> bool:
        return "transpose(" in str(self.eqn.source_info.name_stack)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The operations that made a result not finite, the first one first; later ones made NaN of its infinities."""

    result: str
    operations: tuple[Origin, ...]

    @property
    def line(self) -> str:
        """The first of them, in a line."""
        if not self.operations:
            return f"{self.result} is not finite, but no single operation's result: the program compiled as a whole rounds otherwise"
        return (
            f"{self.result} is not finite; the first such operation is {_told(self.operations[0])}"
        )

    @property
    def lines(self) -> list[str]:
        """All of them, with what went in and came out."""
        found = []
        for origin in self.operations:
            found.append(_told(origin))
            found += [f"    in   {value}" for value in origin.inputs]
            found += [f"    out  {value}" for value in origin.outputs]
        return found


def _told(origin: Origin) -> str:
    of = " and ".join(x.name for x in origin.inputs if x.name)
    what = f"{origin.eqn.primitive.name}{f' of {of}' if of else ''}"
    where = [*origin.places, *(["backward pass"] if origin.backward else [])]
    return ", ".join([f"{what} at {origin.source}", *where])


def find(f: Callable, *args: Any, words: Words = ()) -> Finding | None:
    """The operation at which f(*args) stops being finite; None where all its results are.

    Args:
      f: traceable by JAX. The first of its results that is not finite is explained; names come from their paths.
      args: its arguments, likewise.
      words: (regular expression, word) for loops over an argument whose name matches: ("^layers/", "layer").
    """
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    search = Search(words)
    given = [v for arg in args for v in _named(arg)]
    found = search.run(jaxpr.jaxpr, jaxpr.consts, given, ())
    for (path, _), value in zip(jax.tree.leaves_with_path(shape), found, strict=True):
        if value.bad:
            return Finding(_name(path), tuple(search.resolve(value.origin)))
    return None


def _named(tree: Any) -> Iterator[Value]:
    for path, array in jax.tree.leaves_with_path(tree):
        yield dataclasses.replace(_looked_at([array])[0], name=_name(path))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


WORDS = (("^(adapter|base|model)/layers/", "layer"), ("^batch/", "micro-batch"))


def explain(job: Any, state: Any, number: int) -> str:
    """Why a step was skipped, in a line; the operations in full go to standard error.

    Args:
      job: `jobs.Job`.
      state: after the step, which has changed nothing but the number of steps.
      number: of the step, from 1.
    """
    if hosts.lead():
        print(f"\nstep {number}: looking for what is not finite, and where", file=sys.stderr)
    trained = "adapter" if job.frozen else "model"
    given = {
        trained: state.trainable,
        "base": job.frozen,
        "batch": job.batch(number - 1),
        "step": state.step - 1,
    }

    def measured(given: Any) -> Any:
        before = step.State(given["step"], given[trained], ())
        grads, metrics = job.program.measure(before, given["base"], given["batch"])
        # In this order: what the loss has wrong, the gradient has too.
        return collections.OrderedDict(
            {
                "the loss": metrics["loss"],
                "the gradient of": grads,
                "the gradient's norm": metrics["grad_norm"],
            }
        )

    found = find(measured, given, words=WORDS)
    if found is None:
        return "evaluated operation by operation it is finite: the program compiled as a whole rounds otherwise"
    if hosts.lead():
        print(*found.lines, sep="\n", file=sys.stderr)
    return found.line


class Search:
    """Evaluates jaxprs and keeps book of where what is not finite comes from."""

    def __init__(self, words: Words):
        self._words, self._count = words, 0

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value], places: tuple[str, ...]
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        env = dict(zip(jaxpr.constvars, _looked_at(consts), strict=True))
        env |= zip(jaxpr.invars, values, strict=True)

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return _looked_at([np.asarray(atom.val)])[0]
            return env[atom]

        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
        kept = set(_variables(jaxpr.outvars))
        for i, eqn in enumerate(jaxpr.eqns):
            inputs = [read(v) for v in eqn.invars]
            results = _evaluate(eqn, [x.array for x in inputs], jaxpr.debug_info)
            inside = self._inside(eqn, inputs, places)
            outputs = self._judge(eqn, places, inputs, results, inside)
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
        outputs = _looked_at(results)
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
            if not handed or (origin is None and any(v.name for v in handed)):
                origin = (
                    own  # it came about here, or this is the first to use an argument that holds it
                )
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
            given = [*consts, *_unnamed(carry), *(_part(x, i) for x in xs)]
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
            carry, i = self._step(eqn, here, body, [*consts, *_unnamed(carry)]), i + 1
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


def _looked_at(arrays: Sequence[Any]) -> list[Value]:
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


def _unnamed(values: Sequence[Value]) -> list[Value]:
    return [dataclasses.replace(x, name="") for x in values]


def _part(x: Value, i: int) -> Value:
    """One step of what a scan goes over."""
    part = lax.dynamic_index_in_dim(x.array, np.int32(i), keepdims=False)
    return dataclasses.replace(_looked_at([part])[0] if x.bad else Value(part), name=x.name)
