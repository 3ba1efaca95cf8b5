# SPDX-License-Identifier: Apache-2.0
"""Control flow around adapted weights, rebuilt with the public combinators: views go in as pytrees.

A view never comes out of a loop or a branch: what is only passed on is taken from outside instead, so that NNX, which
returns its parameters from everything, materialises nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jft.lora import rules, views


def _inline(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    return interpreter.closed(eqn.params["jaxpr"], inputs)


def _remat(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
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


def _scan(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
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
    keys = interpreter.split_key(params["length"])

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        x, key = x
        args = [fixed.get(i) for i in range(first_x)]
        for i, value in zip(looped, carry, strict=True):
            args[i] = value
        args += [join(part) for part, (_, join) in zip(x, xs, strict=True)]
        with interpreter.keyed(key):
            out = interpreter.closed(params["jaxpr"], args)
        carry = [out[i - n_consts] for i in looped]
        # What is only passed on is taken from outside afterwards; a view made inside has no outside.
        ys = [None if isinstance(y, views.View) else y for y in out[n_carry:]]
        return carry, ys

    carry, ys = lax.scan(
        body,
        [inputs[i] for i in looped],
        ([part for part, _ in xs], keys),
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
    moving: dict[str, Any] = {"w": x.w}
    for name in ("a", "b", "gain"):
        part = getattr(x, name)
        if part is not None and label in part.labels:
            moving[name] = part.front(label)

    def join(step: dict[str, Any]) -> views.View:
        parts = {
            name: views.Part(step[name], tuple(n for n in getattr(x, name).labels if n != label))
            for name in step
            if name != "w"
        }
        return dataclasses.replace(x, w=step["w"], labels=x.labels[1:], **parts)

    return moving, join


def _while(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    carry = inputs[n_cond + n_body :]
    jaxpr = params["body_jaxpr"].jaxpr
    fixed = {i: x for i, x in enumerate(carry) if isinstance(x, views.View)}
    if any(jaxpr.outvars[i] is not jaxpr.invars[n_body + i] for i in fixed):
        return None
    looped = [i for i in range(len(carry)) if i not in fixed]
    key = interpreter.split_key(None)

    def full(values: Sequence[Any]) -> list[Any]:
        args = [fixed.get(i) for i in range(len(carry))]
        for i, value in zip(looped, values, strict=True):
            args[i] = value
        return args

    def cond(state: Any) -> Any:
        _, values = state
        return interpreter.closed(params["cond_jaxpr"], [*cond_consts, *full(values)])[0]

    def body(state: Any) -> Any:
        key, values = state  # the key is None without dropout
        if key is not None:
            key, step_key = jax.random.split(key)
        with interpreter.keyed(None if key is None else step_key):
            out = interpreter.closed(params["body_jaxpr"], [*body_consts, *full(values)])
        return key, [out[i] for i in looped]

    _, values = lax.while_loop(cond, body, (key, [carry[i] for i in looped]))
    return full(values)


def _cond(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
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


def _shard_map(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Each device gets the blocks of the factors that belong to its block of W."""
    params, jaxpr = eqn.params, eqn.params["jaxpr"]
    if any(isinstance(x, views.View) for x in _forwarded(jaxpr, inputs, jaxpr.outvars)):
        return None
    in_specs = [_specs(x, spec) for x, spec in zip(inputs, params["in_specs"], strict=True)]
    key = interpreter.split_key(None)

    def body(key: Any, *args: Any) -> list[Any]:
        with interpreter.keyed(key), interpreter.manual(checked=params["check_vma"]):
            return interpreter.run(jaxpr, (), args)

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(None if key is None else jax.P(), *in_specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )(key, *inputs)


def _specs(x: Any, spec: jax.P) -> Any:
    """in_specs of one input: of a view's factors, what of W's spec concerns their dimensions."""
    if not isinstance(x, views.View):
        return spec
    axes = dict(zip(x.labels, (*spec, *(None,) * x.w.ndim), strict=False))

    def part(p: views.Part) -> views.Part:
        of: Any = jax.P(*(axes.get(n) for n in p.labels))
        return views.Part(of, p.labels)

    of_w: Any = spec
    return dataclasses.replace(x.each(part), w=of_w)


RULES: dict[str, rules.Rule] = {
    "jit": _inline,
    "closed_call": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
