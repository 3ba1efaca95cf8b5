# SPDX-License-Identifier: Apache-2.0
"""Which arrays lie in a device's memory when most of it is taken: live ranges over the scheduled program.

The compiler's own figure (`memory_analysis()`) is the truth about the size, and it has no breakdown; this has one, and is
near. A buffer is a set of values that must share memory: what a loop carries, what is donated, views. It lives from
its first definition to its last use, across a loop if it is carried; arguments live throughout. Arrays in host memory
or in the chip's own fast memory take none of the device's.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from jft.plan import hlo_text

_VIEWS = ("bitcast", "optimization-barrier", "opt-barrier", "domain")
_NAMELESS = (
    "tuple",
    "get-tuple-element",
    "parameter",
    "while",
    "call",
    "conditional",
    "copy-start",
    "copy-done",
)
# Elementwise, so that the result may take the place of an operand that nobody needs any more.
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp compare convert copy cosine divide exponential exponential-minus-one floor is-finite log"
    " log-plus-one logistic maximum minimum multiply negate not or power remainder round-nearest-even rsqrt select sign"
    " sine sqrt subtract tan tanh xor".split()
)

Value = tuple[str, str, int]  # computation, instruction, which array of its shape


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


@dataclasses.dataclass
class _Range:
    first: int
    last: int


class Liveness:
    """Buffers of a module and when they live."""

    def __init__(self, module: hlo_text.Module, arguments: Sequence[str] = ()) -> None:
        """
        Args:
          module: scheduled.
          arguments: names of the program's flattened arguments, in order; without them, the program's own.
        """
        if not module.scheduled:
            raise ValueError("live ranges need a scheduled module: the text of a compiled program")
        self.module, self.arguments = module, arguments
        self._parents: dict[Value, Value] = {}
        self._ranges: dict[Value, _Range] = {}
        self._members: dict[Value, list[Value]] = collections.defaultdict(list)
        self._order: list[tuple[str, hlo_text.Instruction]] = []
        self._run(module.entry)
        self._extend_arguments()
        self._merge()

    # ---- values that share memory

    def _find(self, value: Value) -> Value:
        path = []
        while (parent := self._parents.get(value, value)) != value:
            path.append(value)
            value = parent
        for one in path:
            self._parents[one] = value
        return value

    def _share(self, one: Iterable[Value], other: Iterable[Value]) -> None:
        for left, right in zip(one, other, strict=True):
            left, right = self._find(left), self._find(right)
            if left != right:
                self._parents[right] = left

    def _values(self, computation: hlo_text.Computation, own: hlo_text.Instruction) -> list[Value]:
        return [(computation.name, own.name, i) for i, _ in enumerate(hlo_text.leaves(own.shape))]

    def _inputs(
        self, computation: hlo_text.Computation, own: hlo_text.Instruction
    ) -> list[list[Value]]:
        return [self._values(computation, one) for one in computation.inputs(own)]

    # ---- the program in the order of execution

    def _run(self, computation: hlo_text.Computation) -> None:
        for own in computation.instructions:
            outputs, inputs = self._values(computation, own), self._inputs(computation, own)
            self._enter(computation, own, outputs, inputs)
            self._order.append((computation.name, own))
            now = len(self._order) - 1
            for value in outputs:
                self._ranges[value] = _Range(now, now)
            for value in (one for group in inputs for one in group):
                self._ranges[value].last = now
            self._alias(computation, own, outputs, inputs)

    def _enter(
        self,
        computation: hlo_text.Computation,
        own: hlo_text.Instruction,
        outputs: list[Value],
        inputs: list[list[Value]],
    ) -> None:
        """Runs what an instruction calls, before the instruction itself ends."""
        if own.opcode == "while":
            for key in ("condition", "body"):
                called = self.module.computations[own.computation(key)]
                self._run(called)
                self._share(inputs[0], self._values(called, called.parameters[0]))
            self._share(inputs[0], self._values(called, called.root))
        elif own.opcode == "conditional":
            for name, given in zip(own.called, inputs[1:], strict=True):
                self._run_called(name, [given], outputs)
        elif own.opcode == "call" or (own.opcode == "async-start" and "calls" in own.attributes):
            self._run_called(own.called[0], inputs, outputs if own.opcode == "call" else [])

    def _run_called(self, name: str, inputs: list[list[Value]], outputs: list[Value]) -> None:
        called = self.module.computations[name]
        self._run(called)
        for number, given in enumerate(inputs):
            self._share(given, self._values(called, called.parameters[number]))
        if outputs:
            self._share(outputs, self._values(called, called.root))

    def _alias(
        self,
        computation: hlo_text.Computation,
        own: hlo_text.Instruction,
        outputs: list[Value],
        inputs: list[list[Value]],
    ) -> None:
        """Results that are an operand's memory, by the meaning of the instruction or by the compiler's word."""
        flat = [value for group in inputs for value in group]
        if own.opcode in _VIEWS or own.opcode == "while":
            self._share(inputs[0], outputs)
        elif own.opcode == "tuple":
            self._share(flat, outputs)
        elif own.opcode == "get-tuple-element":
            before = _leaves_before(
                computation.by_name[own.operands[0]].shape, int(own.attributes["index"])
            )
            self._share(inputs[0][before : before + len(outputs)], outputs)
        elif own.opcode.endswith("-start"):
            self._share_start(own, outputs, flat)
        elif own.opcode.endswith(("-done", "-update")):
            self._share_done(computation, own, outputs, inputs[0])
        else:
            for group in _told(own, inputs, outputs):
                self._share([group[0]] * (len(group) - 1), group[1:])
            if own.opcode == "dynamic-update-slice":
                self._share(inputs[0], outputs)
            if own.opcode == "fusion":
                self._share_fusion(own, outputs, inputs)

    def _share_start(
        self, own: hlo_text.Instruction, outputs: list[Value], flat: list[Value]
    ) -> None:
        if own.opcode == "copy-start":  # (copy, original, context)
            self._share(flat, outputs[1:2])
        elif own.opcode not in ("all-reduce-start", "send", "recv"):  # (operands, results, context)
            self._share(flat, outputs[: len(flat)])

    def _share_done(
        self,
        computation: hlo_text.Computation,
        own: hlo_text.Instruction,
        outputs: list[Value],
        inputs: list[Value],
    ) -> None:
        start = computation.by_name[own.operands[0]]
        skipped = 0
        if not own.opcode.startswith(("copy-", "all-reduce-")) and isinstance(start.shape, tuple):
            skipped = len(list(hlo_text.leaves(start.shape[0])))
        self._share(inputs[skipped : skipped + len(outputs)], outputs)

    def _share_fusion(
        self, own: hlo_text.Instruction, outputs: list[Value], inputs: list[list[Value]]
    ) -> None:
        """Parameters that a fusion hands through, and arrays that it updates in place."""
        called = self.module.computations[own.called[0]]
        roots = called.inputs(called.root) if called.root.opcode == "tuple" else [called.root]
        if len(roots) != len(
            outputs
        ):  # the root starts or ends something asynchronous: the compiler tells what is shared
            return
        for root, output in zip(roots, outputs, strict=True):
            while root.opcode in (*_VIEWS, "dynamic-update-slice"):
                root = called.by_name[root.operands[0]]
            if root.opcode == "parameter" and len(inputs[int(root.literal)]) == 1:
                self._share(inputs[int(root.literal)], [output])

    # ---- live ranges

    def _extend_arguments(self) -> None:
        """Arguments belong to the caller and live throughout; results to its end."""
        end = len(self._order)
        entry = self.module.entry
        for own in entry.parameters.values():
            for value in self._values(entry, own):
                self._ranges[value] = _Range(0, end)
        results = self._values(entry, entry.root)
        for value in results:
            self._ranges[value].last = end
        for output, parameter in self.module.donated.items():
            self._share(self._values(entry, entry.parameters[parameter]), [results[output]])

    def _merge(self) -> None:
        for value in self._ranges:
            self._members[self._find(value)].append(value)
        self._live: dict[Value, _Range] = {
            buffer: _Range(
                min(self._ranges[value].first for value in values),
                max(self._ranges[value].last for value in values),
            )
            for buffer, values in self._members.items()
        }
        self._sizes = {buffer: self._size(values) for buffer, values in self._members.items()}
        self._reuse()

    def _reuse(self) -> None:
        """An elementwise result takes the place of an operand that dies there, where the compiler says nothing (CPU, GPU)."""
        moved: dict[Value, Value] = {}
        for now, (name, own) in enumerate(self._order):
            if (
                not own.operands
                or "aliasing_operands" in own.rest
                or not isinstance(own.shape, hlo_text.Array)
            ):
                continue
            computation = self.module.computations[name]
            output = self._find((name, own.name, 0))
            for number, one in enumerate(computation.inputs(own)):
                operand = self._find((name, one.name, 0))
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

    def _array(self, value: Value) -> hlo_text.Array:
        own = self.module.computations[value[0]].by_name[value[1]]
        return list(hlo_text.leaves(own.shape))[value[2]]

    def _size(self, values: Sequence[Value]) -> int:
        own = self.module.computations[values[0][0]].by_name[values[0][1]]
        if own.opcode == "constant":
            return 0
        arrays = map(self._array, values)
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
        own = self._order[min(moment, len(self._order) - 1)][1]
        buffers = sorted(map(self._buffer, alive), key=lambda one: -one.bytes)
        return Peak(best, own.name, own.op_name, tuple(buffers))

    def _buffer(self, buffer: Value) -> Buffer:
        values = self._members[buffer]
        arguments = [
            v
            for v in values
            if v[0] == self.module.entry.name and self._of(v).opcode == "parameter"
        ]
        value = min(
            values, key=lambda one: (self._of(one).opcode in _NAMELESS, self._ranges[one].first)
        )
        own = self._of(arguments[0] if arguments else value)
        name, what = own.name, "temporary"
        if arguments:
            what, number = "argument", int(own.literal)
            name = (
                self.arguments[number] if number < len(self.arguments) else own.op_name or own.name
            )
        elif self._live[buffer].last == len(self._order):
            what = "result"
        source = self.module.frames.get(own.frame or -1, "")
        return Buffer(what, name, own.op_name, source, str(self._array(value)), self._sizes[buffer])

    def _of(self, value: Value) -> hlo_text.Instruction:
        return self.module.computations[value[0]].by_name[value[1]]


def _alike(one: hlo_text.Shape, other: hlo_text.Shape) -> bool:
    return (
        isinstance(one, hlo_text.Array)
        and isinstance(other, hlo_text.Array)
        and one.dims == other.dims
    )


def _leaves_before(shape: hlo_text.Shape, index: int) -> int:
    assert isinstance(shape, tuple)
    return sum(1 for part in shape[:index] for _ in hlo_text.leaves(part))


def _told(
    own: hlo_text.Instruction, inputs: list[list[Value]], outputs: list[Value]
) -> Iterator[list[Value]]:
    """Operands and results that the compiler says share memory."""
    flat = [value for group in inputs for value in group]
    listed = re.search(r'"aliasing_operands":\{"lists":\[(.*?)\]\}(?:,|\})', own.rest)
    for group in re.findall(r'"indices":\[([^\]]*)\]', listed[1]) if listed else ():
        numbers = [int(n) for n in re.findall(r"\d+", group)]
        yield [(flat + outputs)[n] for n in numbers if n < len(flat) + len(outputs)]
    told = own.attributes.get("output_to_operand_aliasing", "")
    for output, operand in re.findall(r"\{([\d,]*)\}: \((\d+), \{[\d,]*\}", told):
        yield [inputs[int(operand)][0], outputs[int(output or 0)]]
