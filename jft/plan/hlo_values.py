# SPDX-License-Identifier: Apache-2.0
"""Which values of a program share memory, and when each is needed: the program run in mind, instruction by instruction."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from jft.plan import hlo_text

_VIEWS = ("bitcast", "optimization-barrier", "opt-barrier", "domain")

Value = tuple[str, str, int]  # computation, instruction, which array of its shape


@dataclasses.dataclass
class Range:
    """Places in the order of execution."""

    first: int
    last: int


class Values:
    """All values of a scheduled module.

    Attributes:
      order: (computation, instruction) as they run; a loop's body runs once, before the loop ends.
      ranges: when a value is made and last needed.
    """

    def __init__(self, module: hlo_text.Module) -> None:
        if not module.scheduled:
            raise ValueError("live ranges need a scheduled module: the text of a compiled program")
        self.module = module
        self.order: list[tuple[hlo_text.Computation, hlo_text.Instruction]] = []
        self.ranges: dict[Value, Range] = {}
        self._parents: dict[Value, Value] = {}
        self._run(module.entry)
        self._extend_arguments()

    def of(self, value: Value) -> hlo_text.Instruction:
        """The instruction that makes it."""
        return self.module.computations[value[0]].by_name[value[1]]

    def array(self, value: Value) -> hlo_text.Array:
        return list(hlo_text.leaves(self.of(value).shape))[value[2]]

    def find(self, value: Value) -> Value:
        """The one that stands for all that share its memory."""
        path = []
        while (parent := self._parents.get(value, value)) != value:
            path.append(value)
            value = parent
        for one in path:
            self._parents[one] = value
        return value

    def _share(self, one: Iterable[Value], other: Iterable[Value]) -> None:
        for left, right in zip(one, other, strict=True):
            left, right = self.find(left), self.find(right)
            if left != right:
                self._parents[right] = left

    def values(self, computation: hlo_text.Computation, own: hlo_text.Instruction) -> list[Value]:
        """One for each array of its shape."""
        return [(computation.name, own.name, i) for i, _ in enumerate(hlo_text.leaves(own.shape))]

    def _inputs(
        self, computation: hlo_text.Computation, own: hlo_text.Instruction
    ) -> list[list[Value]]:
        return [self.values(computation, one) for one in computation.inputs(own)]

    # ---- the program in the order of execution

    def _run(self, computation: hlo_text.Computation) -> None:
        for own in computation.instructions:
            outputs, inputs = self.values(computation, own), self._inputs(computation, own)
            self._enter(computation, own, outputs, inputs)
            self.order.append((computation, own))
            now = len(self.order) - 1
            for value in outputs:
                self.ranges[value] = Range(now, now)
            for value in (one for group in inputs for one in group):
                self.ranges[value].last = now
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
                self._share(inputs[0], self.values(called, called.parameters[0]))
            self._share(inputs[0], self.values(called, called.root))
        elif own.opcode == "conditional":
            for name, given in zip(own.called, inputs[1:], strict=True):
                self._run_called(name, [given], outputs)
        elif own.opcode == "call" or (own.opcode == "async-start" and "calls" in own.attributes):
            self._run_called(own.called[0], inputs, outputs if own.opcode == "call" else [])

    def _run_called(self, name: str, inputs: list[list[Value]], outputs: list[Value]) -> None:
        called = self.module.computations[name]
        self._run(called)
        for number, given in enumerate(inputs):
            self._share(given, self.values(called, called.parameters[number]))
        if outputs:
            self._share(outputs, self.values(called, called.root))

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
        if own.opcode in (
            "send-done",
            "recv-done",
        ):  # (buffer, context, token) -> (buffer, token) or token
            self._share(inputs[: len(outputs) - 1], outputs[:-1])
            return
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
        if len(roots) != len(outputs):
            return  # it starts or ends something asynchronous: the compiler tells what is shared
        for root, output in zip(roots, outputs, strict=True):
            while root.opcode in (*_VIEWS, "dynamic-update-slice"):
                root = called.by_name[root.operands[0]]
            if root.opcode == "parameter" and len(inputs[int(root.literal)]) == 1:
                self._share(inputs[int(root.literal)], [output])

    def _extend_arguments(self) -> None:
        """Arguments belong to the caller and live throughout; results to its end."""
        end = len(self.order)
        entry = self.module.entry
        for own in entry.parameters.values():
            for value in self.values(entry, own):
                self.ranges[value] = Range(0, end)
        results = self.values(entry, entry.root)
        for value in results:
            self.ranges[value].last = end
        for output, parameter in self.module.donated.items():
            self._share(self.values(entry, entry.parameters[parameter]), [results[output]])


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
