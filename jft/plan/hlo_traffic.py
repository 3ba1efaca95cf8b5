# SPDX-License-Identifier: Apache-2.0
"""Bytes that a program moves to and from device memory: a rough count for the roofline.

Every instruction that runs reads its operands and writes its results, once, where they lie in device memory; what a
fusion keeps inside moves nothing, nor does what lies in the chip's own fast memory. Of an array that is only sliced,
or updated in place, the slice counts. Reads that a cache serves, or that tiles repeat, are not seen.
"""

from jft.plan import hlo_collectives, hlo_flops, hlo_text

# They move nothing themselves: names for memory, control flow, and ends of what was counted at its start.
_STILL = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id"
    " optimization-barrier opt-barrier add-dependency domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
# In fusions: the parts of exchanges that run beside them, and handing through.
_PASSED = frozenset((*hlo_collectives.KINDS, "custom-call", "tuple"))


def count(walk: hlo_flops.Walk) -> float:
    """Bytes of one call of the program on one device."""
    total = 0.0
    for step in walk.steps():
        inside = any(own.opcode == "fusion" for own in step.within)
        if (
            not inside
            and step.own.opcode not in _STILL
            and not step.own.opcode.endswith(("-done", "-update"))
        ):
            total += step.times * _moved(step.own, step.computation, walk.module)
    return total


def _moved(
    own: hlo_text.Instruction, computation: hlo_text.Computation, module: hlo_text.Module
) -> int:
    inputs = computation.inputs(own)
    if own.opcode in _SLICES:
        return 2 * _bytes(own.shape)
    if own.opcode == "dynamic-update-slice":
        return 2 * _bytes(inputs[1].shape)
    if own.opcode.endswith("-start") and isinstance(
        own.shape, tuple
    ):  # (operands, results) or (result, operand)
        return sum(_bytes(part) for part in own.shape[:2])
    if own.opcode == "custom-call" and not inputs:  # memory set aside, not written
        return 0
    if own.opcode != "fusion":
        return sum(_bytes(one.shape) for one in inputs) + _bytes(own.shape)
    called = module.computations[own.called[0]]
    read = sum(_read(called, number, one, module) for number, one in enumerate(inputs))
    return read + sum(_written(called, root, module) for root in _roots(called))


def _roots(called: hlo_text.Computation) -> list[hlo_text.Instruction]:
    return called.inputs(called.root) if called.root.opcode == "tuple" else [called.root]


def _read(
    called: hlo_text.Computation,
    number: int,
    given: hlo_text.Instruction,
    module: hlo_text.Module,
) -> int:
    whole = _bytes(given.shape)
    return min(whole, _used(called, called.parameters[number], module)) if whole else 0


def _used(
    called: hlo_text.Computation, source: hlo_text.Instruction, module: hlo_text.Module
) -> int:
    """Bytes of a fusion's value that it reads: the slices where it is sliced, also by fusions within; else all of it.

    What is handed through, updated in place, or given to an exchange that runs meanwhile is not read here.
    """
    total = 0
    for own in called.instructions:
        for place in [i for i, name in enumerate(own.operands) if name == source.name]:
            if own.opcode in _SLICES:
                total += _plain(own.shape) if place == 0 else 0
            elif own.opcode == "fusion":
                inner = module.computations[own.called[0]]
                total += _used(inner, inner.parameters[place], module)
            elif own.opcode == "bitcast":
                total += _used(called, own, module)
            elif not (
                own.opcode in _PASSED or (own.opcode == "dynamic-update-slice" and not place)
            ):
                total += _plain(source.shape)
    return total


def _written(
    called: hlo_text.Computation, root: hlo_text.Instruction, module: hlo_text.Module
) -> int:
    where, starts = (
        root.shape,
        any("AsyncCollectiveStart" in own.rest for own in called.instructions),
    )
    while root.opcode in ("bitcast", "fusion"):
        if root.opcode == "bitcast":
            root = called.by_name[root.operands[0]]
            continue
        called = module.computations[root.called[0]]
        if called.root.opcode == "tuple":
            return _bytes(where)
        root = called.root
    if root.opcode == "dynamic-update-slice":
        return _plain(called.by_name[root.operands[1]].shape) if _bytes(where) else 0
    # An exchange that runs meanwhile writes its result once, counted where it starts.
    if root.opcode in _PASSED and not starts:
        return 0
    return 0 if root.opcode == "parameter" else _bytes(where)


def _bytes(shape: hlo_text.Shape) -> int:
    """In device memory."""
    return sum(one.bytes for one in hlo_text.leaves(shape) if one.space == hlo_text.DEVICE)


def _plain(shape: hlo_text.Shape) -> int:
    """Wherever: a value inside a fusion has no memory of its own."""
    return sum(one.bytes for one in hlo_text.leaves(shape))
