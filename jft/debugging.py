# SPDX-License-Identifier: Apache-2.0
"""Finds the first operation of a function whose result is not finite: through jit, remat, scans, LoRA and gradients.

    found = debugging.find(f, *args)
    print(found.line)    # y is not finite; the first such operation is log at f.py:9:36 (f), layer 7

How it is done is in `origins`. `jft train --debug` looks at a step in this way (`explain`).
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jft import hosts, origins, step

SHOWN = 6  # inputs of an operation at most
WORDS = (("^(adapter|base|model)/layers/", "layer"), ("^batch/", "micro-batch"))


@dataclasses.dataclass(frozen=True)
class Finding:
    """The operations that made a result not finite, the first one first; later ones made NaN of its infinities."""

    result: str
    operations: tuple[origins.Origin, ...]

    @property
    def line(self) -> str:
        """The first of them, in a line."""
        if not self.operations:
            return f"{self.result} is not finite, for a constant of the function is not"
        return (
            f"{self.result} is not finite; the first such operation is {_told(self.operations[0])}"
        )

    @property
    def lines(self) -> list[str]:
        """All of them, with what went in and came out."""
        found = []
        for origin in self.operations:
            found += [_told(origin), *_shown("in", origin.inputs), *_shown("out", origin.outputs)]
        return found


def _shown(label: str, values: Sequence[origins.Value]) -> list[str]:
    """Values, of many those that are not finite first."""
    some = sorted(values, key=lambda value: not value.bad) if len(values) > SHOWN else values
    lines = [f"    {label:<4} {value}" for value in some[:SHOWN]]
    return [*lines, f"    {label:<4} and {len(some) - SHOWN} more"] if len(some) > SHOWN else lines


def _told(origin: origins.Origin) -> str:
    of = " and ".join(x.name for x in origin.inputs if x.name)
    what = f"{origin.eqn.primitive.name}{f' of {of}' if of else ''}"
    return ", ".join([f"{what} at {origin.source}", *origin.places])


def find(f: Callable, *args: Any, words: origins.Words = ()) -> Finding | None:
    """The operation at which f(*args) stops being finite; None where all its results are.

    Args:
      f: traceable by JAX. The first of its results that is not finite is explained; names come from their paths.
      args: its arguments, likewise.
      words: (regular expression, word) for loops over an argument whose name matches: ("^layers/", "layer").
    """
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    search = origins.Search(words)
    given = [v for arg in args for v in _named(arg)]
    found = search.run(jaxpr.jaxpr, jaxpr.consts, given, ())
    for (path, _), value in zip(jax.tree.leaves_with_path(shape), found, strict=True):
        if value.bad:
            return Finding(_name(path), tuple(search.resolve(value.origin)))
    return None


def _named(tree: Any) -> Iterator[origins.Value]:
    for path, array in jax.tree.leaves_with_path(tree):
        yield dataclasses.replace(origins.looked_at([array])[0], name=_name(path))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    lines = found.lines  # which all processes compute together
    if hosts.lead():
        print(*lines, sep="\n", file=sys.stderr)
    return found.line
