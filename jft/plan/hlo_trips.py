# SPDX-License-Identifier: Apache-2.0
"""How often the body of each while loop runs.

The compiler's own count where it wrote one (CPU, GPU), else read from the loop: its condition compares a counter, which
the body moves by a constant, with a constant (TPU; counters of collective matmuls move by two, and constants pass
through tuples and fusions). A loop that depends on data runs at most as often as its name scope says:
`jax.named_scope("at_most_32_trips")` around it.
"""

import dataclasses
import json
import re

from jft.plan import hlo_text

_AT_MOST = re.compile(r"at_most_(\d+)_trips")
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Trips:
    """Of one loop: `count` is None where nothing tells it; `stated` where only a scope does."""

    count: int | None
    stated: bool = False


@dataclasses.dataclass(frozen=True)
class _Term:
    """A number known at compile time, or element `carried` of the loop's tuple plus a number."""

    number: int
    carried: int | None = None


class Counter:
    """Counts the trips of a module's loops."""

    def __init__(self, module: hlo_text.Module) -> None:
        self.module = module
        self._callers = {
            called: (computation, own)
            for computation in module.computations.values()
            for own in computation.instructions
            for called in own.called
        }

    def trips(self, loop: hlo_text.Instruction) -> Trips:
        """Trips of the body of one `while`."""
        found = re.search(r'"known_trip_count":(\{[^}]*\})', loop.rest)
        if found:
            return Trips(int(json.loads(found[1])["n"]))
        count = self._computed(loop)
        if count is not None:
            return Trips(count)
        return Trips(self._stated(loop), stated=True)

    def _stated(self, loop: hlo_text.Instruction) -> int | None:
        """From the scope around the loop: the last step of the loop's own path, or of its instructions' before theirs."""
        paths = [loop.op_name.rpartition("/while/body")[2]]
        for own in self.module.computations[loop.computation("body")].instructions:
            before, _, _ = own.op_name.rpartition("/while/body")
            paths.append(before.rpartition("/while/body")[2])
        stated = [int(found[-1]) for found in map(_AT_MOST.findall, paths) if found]
        return max(stated) if stated else None

    def _computed(self, loop: hlo_text.Instruction) -> int | None:
        computation = self.module.computations[loop.computation("condition")]
        test, given = computation.root, {}
        while test.opcode in ("fusion", "call"):
            inner = self.module.computations[test.called[0]]
            given = {**given, inner.name: (computation, test, given)}
            computation, test = inner, inner.root
        if test.opcode != "compare":
            return None
        left, right = (self._term(computation, side, given) for side in computation.inputs(test))
        direction = test.attributes["direction"]
        if left is None or right is None:
            return None
        if left.carried is None:
            left, right, direction = right, left, _MIRRORED.get(direction, "")
        if left.carried is None:
            return None
        start, step = self._start(loop, left.carried), self._step(loop, left.carried)
        bound = self._bound(loop, right)
        if start is None or not step or bound is None:
            return None
        return _runs(start + left.number, bound, step, direction)

    def _term(
        self, computation: hlo_text.Computation, own: hlo_text.Instruction, given: dict
    ) -> _Term | None:
        """What a scalar is, seen from the loop whose body or condition is the outermost computation."""
        if own.opcode == "constant":
            return _Term(int(own.literal)) if re.fullmatch(r"-?\d+", own.literal) else None
        if own.opcode in _SAME:
            return self._term(computation, computation.by_name[own.operands[0]], given)
        if own.opcode == "parameter":
            if computation.name not in given:
                return None
            outer, call, before = given[computation.name]
            return self._term(outer, outer.by_name[call.operands[int(own.literal)]], before)
        if own.opcode == "get-tuple-element":
            return self._element(computation, own, given)
        if own.opcode in ("add", "subtract"):
            left, right = (self._term(computation, one, given) for one in computation.inputs(own))
            return _sum(left, right, 1 if own.opcode == "add" else -1)
        if own.opcode in ("fusion", "call"):
            inner = self.module.computations[own.called[0]]
            return self._term(inner, inner.root, {inner.name: (computation, own, given)})
        return None

    def _element(
        self, computation: hlo_text.Computation, own: hlo_text.Instruction, given: dict
    ) -> _Term | None:
        index, source = int(own.attributes["index"]), computation.by_name[own.operands[0]]
        if source.opcode == "parameter" and computation.name not in given:
            return _Term(0, carried=index)
        if source.opcode == "tuple":
            return self._term(computation, computation.by_name[source.operands[index]], given)
        if source.opcode == "fusion":
            inner = self.module.computations[source.called[0]]
            if inner.root.opcode == "tuple":
                part = inner.by_name[inner.root.operands[index]]
                return self._term(inner, part, {inner.name: (computation, source, given)})
        return None

    def _step(self, loop: hlo_text.Instruction, index: int) -> int | None:
        """What the body adds to an element of its tuple."""
        body = self.module.computations[loop.computation("body")]
        if body.root.opcode != "tuple":
            return None
        after = self._term(body, body.by_name[body.root.operands[index]], {})
        return after.number if after and after.carried == index else None

    def _start(self, loop: hlo_text.Instruction, index: int) -> int | None:
        """An element of the tuple that the loop starts with, through the loops around it where they leave it alone."""
        outer, _ = self._callers[loop.computation("body")]
        source = outer.by_name[loop.operands[0]]
        if source.opcode != "tuple":
            return None
        found = self._term(outer, outer.by_name[source.operands[index]], {})
        if found is None or found.carried is None:
            return found.number if found else None
        if outer.name not in self._callers:  # an argument of the program
            return None
        around = self._callers[outer.name][1]
        if around.opcode != "while" or self._step(around, found.carried) != 0:
            return None
        before = self._start(around, found.carried)
        return None if before is None else before + found.number

    def _bound(self, loop: hlo_text.Instruction, side: _Term) -> int | None:
        if side.carried is None:
            return side.number
        start = self._start(loop, side.carried) if self._step(loop, side.carried) == 0 else None
        return None if start is None else start + side.number


def _sum(left: _Term | None, right: _Term | None, sign: int) -> _Term | None:
    if (
        left is None
        or right is None
        or (right.carried is not None and (sign < 0 or left.carried is not None))
    ):
        return None
    carried = left.carried if left.carried is not None else right.carried
    return _Term(left.number + sign * right.number, carried)


def _runs(start: int, bound: int, step: int, direction: str) -> int | None:
    """Trips of `for (i = start; i DIRECTION bound; i += step)`."""
    distance = (bound - start) * (1 if step > 0 else -1)
    if direction in ("LE", "GE"):
        distance += 1
    ends = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0}
    if direction == "NE":
        return distance // abs(step) if distance >= 0 and not distance % abs(step) else None
    if not ends.get(direction):
        return None
    return max(0, -(-distance // abs(step)))
