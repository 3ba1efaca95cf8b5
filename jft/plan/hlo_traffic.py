# SPDX-License-Identifier: Apache-2.0
"""Bytes that a program moves to and from device memory: a rough count for the roofline.

Every instruction that runs reads its operands and writes its results, once, where they lie in device memory; what a
fusion keeps inside moves nothing, nor does what lies in the chip's own fast memory. Of an array that is only sliced,
or updated in place, the slice counts. Reads that a cache serves, or that tiles repeat, are not seen.
"""

from jft.plan import hlo_flops, hlo_text

# They move nothing themselves: names for memory, control flow, and ends of what was counted at its start.
_STILL = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id"
    " optimization-barrier opt-barrier add-dependency domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


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
    return read + sum(_written(called, root) for root in _roots(called))


def _roots(called: hlo_text.Computation) -> list[hlo_text.Instruction]:
    return called.inputs(called.root) if called.root.opcode == "tuple" else [called.root]


def _read(
    called: hlo_text.Computation,
    number: int,
    given: hlo_text.Instruction,
    module: hlo_text.Module,
) -> int:
    """Of a parameter: all of it, or the slices if it is only sliced, and nothing if it is only updated in place."""
    whole = _bytes(given.shape)
    parts = _parts(called, called.parameters[number].name, module) if whole else None
    return whole if parts is None else min(whole, parts)


def _parts(called: hlo_text.Computation, name: str, module: hlo_text.Module) -> int | None:
    """Bytes of the slices that are taken of a value; None if something reads all of it. Looks into fusions in fusions."""
    total = 0
    users = [own for own in called.instructions if name in own.operands]
    for own in users:
        part: int | None = 0
        if own.opcode in _SLICES:
            part = _plain(own.shape)
        elif own.opcode == "bitcast":
            part = _parts(called, own.name, module)
        elif own.opcode == "fusion":
            inner = module.computations[own.called[0]]
            places = [i for i, operand in enumerate(own.operands) if operand == name]
            found = [_parts(inner, inner.parameters[i].name, module) for i in places]
            part = None if None in found else sum(one or 0 for one in found)
        elif own.opcode != "dynamic-update-slice":
            part = None
        if part is None:
            return None
        total += part
    return total if users else None


def _written(called: hlo_text.Computation, root: hlo_text.Instruction) -> int:
    where = root.shape
    while root.opcode == "bitcast":
        root = called.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _plain(called.by_name[root.operands[1]].shape) if _bytes(where) else 0
    return 0 if root.opcode == "parameter" else _bytes(where)


def _bytes(shape: hlo_text.Shape) -> int:
    """In device memory."""
    return sum(one.bytes for one in hlo_text.leaves(shape) if one.space == hlo_text.DEVICE)


def _plain(shape: hlo_text.Shape) -> int:
    """Wherever: a value inside a fusion has no memory of its own."""
    return sum(one.bytes for one in hlo_text.leaves(shape))
