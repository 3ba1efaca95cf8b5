# SPDX-License-Identifier: Apache-2.0
"""Which arrays lie in a device's memory when most of it is taken: live ranges over the scheduled program.

The compiler's own figure (`memory_analysis()`) is the truth about the size, and it has no breakdown; this has one, and is
near. A buffer is a set of values that must share memory: what a loop carries, what is donated, views. It lives from
its first definition to its last use, across a loop if it is carried; arguments live throughout. Arrays in host memory
or in the chip's own fast memory take none of the device's.
"""

import collections
import dataclasses
from collections.abc import Sequence

from jft.plan import hlo_text, hlo_values

Value = hlo_values.Value

_NAMELESS = frozenset(
    "tuple get-tuple-element parameter while call conditional copy-start copy-done".split()
)
# Elementwise, so that the result may take the place of an operand that nobody needs any more.
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp compare convert copy cosine divide exponential exponential-minus-one floor is-finite log"
    " log-plus-one logistic maximum minimum multiply negate not or power remainder round-nearest-even rsqrt select sign"
    " sine sqrt subtract tan tanh xor".split()
)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Memory of one array on one device."""

    what: str  # "argument", "result" or "temporary"
    name: str  # of the argument, else of the instruction that makes it
    op_name: str
    source: str
    shape: str
    bytes: int  # with the padding of tiles


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment at which most memory is taken."""

    bytes: int
    at: str  # the instruction that runs then
    op_name: str
    buffers: tuple[Buffer, ...]  # alive then, the largest first


class Liveness:
    """Buffers of a module and when they live."""

    def __init__(self, module: hlo_text.Module, arguments: Sequence[str] = ()) -> None:
        """
        Args:
          module: scheduled.
          arguments: names of the program's flattened arguments, in order; without them, the program's own.
        """
        self.module, self.arguments = module, arguments
        self._values = hlo_values.Values(module)
        self._members: dict[Value, list[Value]] = collections.defaultdict(list)
        for value in self._values.ranges:
            self._members[self._values.find(value)].append(value)
        self._live = {buffer: self._range(values) for buffer, values in self._members.items()}
        self._sizes = {buffer: self._size(values) for buffer, values in self._members.items()}
        self._reuse()

    def _range(self, values: Sequence[Value]) -> hlo_values.Range:
        ranges = [self._values.ranges[value] for value in values]
        return hlo_values.Range(min(one.first for one in ranges), max(one.last for one in ranges))

    def _reuse(self) -> None:
        """An elementwise result takes the place of an operand that dies there, where the compiler says nothing (CPU, GPU)."""
        moved: dict[Value, Value] = {}
        for now, (computation, own) in enumerate(self._values.order):
            told = "aliasing_operands" in own.rest
            if told or not own.operands or not isinstance(own.shape, hlo_text.Array):
                continue
            output = self._values.find((computation.name, own.name, 0))
            for number, one in enumerate(computation.inputs(own)):
                operand = self._values.find((computation.name, one.name, 0))
                while operand in moved:
                    operand = moved[operand]
                if self._dies_for(operand, output, now) and self._elementwise(own, number, one):
                    self._live[operand].last = self._live.pop(output).last
                    moved[output] = operand
                    break

    def _dies_for(self, operand: Value, output: Value, now: int) -> bool:
        """Whether one buffer ends where another of its size begins."""
        if operand == output or output not in self._live or not self._sizes[output]:
            return False
        ends = self._live[operand].last == now == self._live[output].first
        return ends and self._sizes[operand] == self._sizes[output]

    def _elementwise(
        self, own: hlo_text.Instruction, number: int, operand: hlo_text.Instruction
    ) -> bool:
        """Whether each element of the result depends on the same element of an operand, and no other of it."""
        if own.opcode in _ELEMENTWISE:
            return True
        if own.opcode != "fusion" or not isinstance(operand.shape, hlo_text.Array):
            return False
        called = self.module.computations[own.called[0]]
        reached = {called.parameters[number].name}
        for one in called.instructions:
            if reached.isdisjoint(one.operands):
                continue
            if one.opcode not in _ELEMENTWISE or not _alike(one.shape, operand.shape):
                return False
            reached.add(one.name)
        return called.root.name in reached

    def _size(self, values: Sequence[Value]) -> int:
        if self._values.of(values[0]).opcode == "constant":
            return 0  # lies with the program
        arrays = map(self._values.array, values)
        return max((one.padded_bytes for one in arrays if one.space == hlo_text.DEVICE), default=0)

    # ---- the peak

    def peak(self) -> Peak:
        """The moment of most memory, and what lies in it."""
        changes: collections.Counter[int] = collections.Counter()
        for buffer, live in self._live.items():
            changes[live.first] += self._sizes[buffer]
            changes[live.last + 1] -= self._sizes[buffer]
        taken, best, moment = 0, 0, 0
        for time in sorted(changes):
            taken += changes[time]
            if taken > best:
                best, moment = taken, time
        alive = [
            one
            for one, live in self._live.items()
            if self._sizes[one] and live.first <= moment <= live.last
        ]
        own = self._values.order[min(moment, len(self._values.order) - 1)][1]
        buffers = sorted(map(self._buffer, alive), key=lambda one: -one.bytes)
        return Peak(best, own.name, own.op_name, tuple(buffers))

    def _buffer(self, buffer: Value) -> Buffer:
        values, made = self._members[buffer], self._values.of
        entry = self.module.entry.name
        arguments = [v for v in values if v[0] == entry and made(v).opcode == "parameter"]
        # The first that makes it and knows which operation it is of: memory is often set aside before it is written.
        value = min(values, key=lambda v: (_nameless(made(v)), self._values.ranges[v].first))
        own, what = made(arguments[0] if arguments else value), "temporary"
        name = own.name
        if arguments:
            what, number = "argument", int(own.literal)
            named = number < len(self.arguments)
            name = self.arguments[number] if named else own.op_name or own.name
        elif self._live[buffer].last == len(self._values.order):
            what = "result"
        shape, source = str(self._values.array(value)), self.module.frames.get(own.frame or -1, "")
        return Buffer(what, name, own.op_name, source, shape, self._sizes[buffer])


def _nameless(own: hlo_text.Instruction) -> tuple[bool, bool]:
    return own.opcode in _NAMELESS, not own.op_name


def _alike(one: hlo_text.Shape, other: hlo_text.Shape) -> bool:
    return (
        isinstance(one, hlo_text.Array)
        and isinstance(other, hlo_text.Array)
        and one.dims == other.dims
    )
