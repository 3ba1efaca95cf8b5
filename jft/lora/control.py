# SPDX-License-Identifier: Apache-2.0
"""Control flow around adapted weights, rebuilt with the public combinators: views go in as pytrees.

A view does not come out of a loop: what is only passed on is taken from outside instead, so that NNX, which returns
its parameters from everything, materialises nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from jft.lora import packed, rules, views


def _inline(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    return interpreter.closed(eqn.params["jaxpr"], inputs)


def _remat(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    passed: dict[int, int] = {}

    def body(*args: Any) -> list[Any]:
        out = interpreter.run(eqn.params["jaxpr"], (), args)
        passed.update(_passed_on(args, out))
        return [None if i in passed else x for i, x in enumerate(out)]

    out = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(
        *inputs
    )
    return [inputs[passed[i]] if i in passed else x for i, x in enumerate(out)]


def _passed_on(args: Sequence[Any], outputs: Sequence[Any]) -> dict[int, int]:
    """{output: argument} of the views that come out as they went in, through however many functions within."""
    given = {id(x): i for i, x in enumerate(args) if isinstance(x, views.View)}
    return {i: given[id(y)] for i, y in enumerate(outputs) if id(y) in given}


def _check_carry(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Raises Mixed for a view in the carry that does not come back as it went in: only then is it a constant."""
    for x, y in zip(before, after, strict=True):
        if (isinstance(x, views.View) or isinstance(y, views.View)) and x is not y:
            raise views.Mixed


def _fill(fixed: Mapping[int, Any], looped: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The list of the values that stand still and of those that loop, each at its place."""
    full = {**fixed, **dict(zip(looped, values, strict=True))}
    return [full[i] for i in range(len(full))]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of constants and carries of a scan equation; jax 0.12 says them in another way than 0.10."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def _scan(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    n_consts, n_carry = scan_counts(params)
    first_x = n_consts + n_carry
    carried = range(n_consts, first_x)
    looped = [i for i in carried if not isinstance(inputs[i], views.View)]
    fixed = {i: inputs[i] for i in range(first_x) if i not in looped}
    xs = [_scanned(x) for x in inputs[first_x:]]
    keys = interpreter.split_key(params["length"])
    passed: dict[int, int] = {}

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        x, key = x
        args = _fill(fixed, looped, carry)
        args += [join(part) for part, (_, join) in zip(x, xs, strict=True)]
        with interpreter.keyed(key):
            out = interpreter.closed(params["jaxpr"], args)
        _check_carry(args[n_consts:first_x], out[:n_carry])
        passed.update(_passed_on(args, out))
        for i, y in enumerate(out[n_carry:], n_carry):
            if isinstance(y, views.View) and passed.get(i, -1) < first_x:
                raise views.Mixed  # made inside, or a constant stacked: it has no outside
        carry = [out[i - n_consts] for i in looped]
        return carry, [None if i in passed else out[i] for i in range(n_carry, len(out))]

    carry, ys = lax.scan(
        body,
        [inputs[i] for i in looped],
        ([part for part, _ in xs], keys),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    out = _fill(fixed, looped, carry)[n_consts:] + ys
    return [inputs[passed[i]] if i in passed else x for i, x in enumerate(out)]


def _scanned(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What to scan over for one input, and how the body makes its argument from one step of it."""
    if not isinstance(x, views.View):
        return x, lambda part: part
    label = x.labels[0]
    if isinstance(x.w, packed.Packed) and x.w.steps:
        x = dataclasses.replace(x, w=x.w.dense())
    is_packed = isinstance(x.w, packed.Packed)
    moving: dict[str, Any] = {"w": x.w.leaf if is_packed else x.w}
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
        w = packed.cast(packed.pack(step["w"]), x.w.dtype) if is_packed else step["w"]
        return dataclasses.replace(x, w=w, labels=x.labels[1:], **parts)

    return moving, join


def _while(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    carry = inputs[n_cond + n_body :]
    fixed = {i: x for i, x in enumerate(carry) if isinstance(x, views.View)}
    looped = [i for i in range(len(carry)) if i not in fixed]
    key = interpreter.split_key(None)

    def cond(state: Any) -> Any:
        _, values = state
        args = [*cond_consts, *_fill(fixed, looped, values)]
        return interpreter.closed(params["cond_jaxpr"], args)[0]

    def body(state: Any) -> Any:
        key, values = state  # the key is None without dropout
        if key is not None:
            key, step_key = jax.random.split(key)
        args = _fill(fixed, looped, values)
        with interpreter.keyed(None if key is None else step_key):
            out = interpreter.closed(params["body_jaxpr"], [*body_consts, *args])
        _check_carry(args, out)
        return key, [out[i] for i in looped]

    _, values = lax.while_loop(cond, body, (key, [carry[i] for i in looped]))
    return _fill(fixed, looped, values)


def _cond(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    index, *operands = inputs
    passed: list[dict[int, int]] = []
    structures: list[Any] = []

    def call(branch: Any, args: Sequence[Any]) -> list[Any]:
        out = interpreter.closed(branch, args)
        passed.append(_passed_on(args, out))
        out = [None if i in passed[-1] else x for i, x in enumerate(out)]
        structures.append(jax.tree.structure(out))
        if passed[-1] != passed[0] or structures[-1] != structures[0]:
            raise views.Mixed  # the branches' views differ: one is W, the other 0 * W or V
        return out

    calls = [functools.partial(call, branch) for branch in eqn.params["branches"]]
    out = lax.switch(index, calls, operands)
    return [operands[passed[0][i]] if i in passed[0] else x for i, x in enumerate(out)]


def _shard_map(interpreter: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    """Each device gets the blocks of the factors that belong to its block of W."""
    params = eqn.params
    in_specs = [_specs(x, spec) for x, spec in zip(inputs, params["in_specs"], strict=True)]
    key = interpreter.split_key(None)

    def body(key: Any, *args: Any) -> list[Any]:
        with interpreter.keyed(key), interpreter.manual(checked=params["check_vma"]):
            out = interpreter.run(params["jaxpr"], (), args)
        if any(isinstance(y, views.View) for y in out):
            raise views.Mixed
        return out

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
