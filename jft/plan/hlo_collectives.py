# SPDX-License-Identifier: Apache-2.0
"""What a program sends between devices: kinds, mesh axes, bytes, how often; read from its optimised HLO.

Bytes on the wire are what one device sends by the ring algorithms, with n devices in a group and I bytes of input:
all-gather I (n - 1), reduce-scatter and all-to-all I (n - 1) / n, all-reduce both of them 2 I (n - 1) / n, a permutation I.
Between TPU slices the compiler hands arrays to the host, with `send`, which exchanges them over the data-centre network.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jft.plan import hlo_flops, hlo_text

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ITEM = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"  # iota: shape, of a range in this shape, transposed


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange; sizes are of one device and one execution."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that it goes over; empty when it goes nowhere
    group: int  # devices that take part in one exchange
    shapes: tuple[hlo_text.Array, ...]  # what it gives
    payload: int  # bytes of the whole arrays: of what an all-gather gives, of what the others take
    wire: float  # bytes that a device sends
    times: float
    op_name: str
    name: str
    source: str

    @property
    def total(self) -> float:
        return self.wire * self.times


def collect(walk: hlo_flops.Walk, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """All collectives that a program executes.

    Args:
      walk: of the program.
      mesh: size of each axis, in the mesh's order (`jax.sharding.Mesh.shape`). A device's number in the program is its
        place in the mesh.
    """
    steps = [step for step in walk.steps() if _kind(step.own)]
    started = {_identity(step) for step in steps if _starts(step)}
    # TPU spreads an asynchronous collective over the fusions that hide it; each holds it again.
    counted = [
        one for one in steps if _starts(one) or not (_fused(one) and _identity(one) in started)
    ]
    return tuple(_collective(step, mesh, walk.module) for step in counted)


def _kind(own: hlo_text.Instruction) -> str | None:
    if own.opcode == "send":  # to a host: other slices
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', own.rest)
        return found[1].lower().replace("_", "-") if found else None
    kind = own.opcode.removesuffix("-start").removeprefix("ragged-")
    return kind if kind in KINDS else None


def _fused(step: hlo_flops.Step) -> bool:
    return bool(step.within) and step.within[-1].opcode == "fusion"


def _starts(step: hlo_flops.Step) -> bool:
    """In a fusion that starts an asynchronous collective."""
    return _fused(step) and any(
        "AsyncCollectiveStart" in own.rest for own in step.computation.instructions
    )


def _identity(step: hlo_flops.Step) -> tuple[str, ...]:
    own = step.own
    keys = ("channel_id", "replica_groups", "source_target_pairs")
    return (own.opcode, own.op_name, *(own.attributes.get(key, "") for key in keys))


def _collective(
    step: hlo_flops.Step, mesh: Mapping[str, int], module: hlo_text.Module
) -> Collective:
    own, kind = step.own, _kind(step.own)
    assert kind
    inputs = [leaf for one in step.computation.inputs(own) for leaf in hlo_text.leaves(one.shape)]
    taken = sum(leaf.bytes for leaf in inputs)
    groups = groups_of(own, math.prod(mesh.values()), module.partitions)
    size = 2 if kind == "collective-permute" else len(groups[0])
    return Collective(
        kind=kind,
        axes=axes_of(groups, mesh),
        group=size,
        shapes=_results(own),
        payload=taken * size if kind == "all-gather" else taken,
        wire=_wire(kind, taken, size),
        times=step.times,
        op_name=own.op_name,
        name=own.name,
        source=module.frames.get(own.frame or -1, ""),
    )


def _wire(kind: str, taken: int, size: int) -> float:
    share = taken * (size - 1) / size
    return {
        "all-gather": taken * (size - 1),
        "reduce-scatter": share,
        "all-to-all": share,
        "all-reduce": 2 * share,
    }.get(kind, float(taken))


def _results(own: hlo_text.Instruction) -> tuple[hlo_text.Array, ...]:
    """An asynchronous start's shape holds what it takes, what it gives, and semaphores; but an all-reduce's only the second."""
    shape = own.shape
    if (
        isinstance(shape, tuple)
        and own.opcode.endswith("-start")
        and own.opcode != "all-reduce-start"
    ):
        shape = shape[1]
    elif isinstance(shape, tuple) and own.opcode == "send":
        shape = shape[0]
    return tuple(hlo_text.leaves(shape))


def groups_of(own: hlo_text.Instruction, devices: int, partitions: int) -> list[list[int]]:
    """Devices that exchange with each other; of a permutation, its pairs. A program of several slices is that of one."""
    if own.opcode == "send":
        return [list(range(first, devices, partitions)) for first in range(partitions)]
    pairs = own.attributes.get("source_target_pairs")
    if pairs:
        return _lists(pairs)
    text = own.attributes.get("replica_groups", "{}")
    if text.startswith("mesh"):
        return _named(text, own.attributes.get("device_ids", ""))
    iota = re.fullmatch(_ITEM, text)
    if iota:
        return _iota(*iota.groups()).tolist()
    return _lists(text) or [list(range(partitions))]


def _lists(text: str) -> list[list[int]]:
    return [[int(n) for n in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", text)]


def _iota(shape: str, source: str, transposed: str | None) -> np.ndarray:
    sizes = [int(n) for n in source.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if transposed:
        ids = ids.transpose([int(n) for n in transposed.split(",")])
    return ids.reshape([int(n) for n in shape.split(",")])


def _named(text: str, ids: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4] {'b':(1)2}`: groups over axes, or parts of axes, of a mesh of the compiler's own."""
    text, ids = (text, "") if "{" in text else (text + ids[ids.rindex("{") :], ids)
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", text)}
    numbers = np.arange(math.prod(sizes.values()))
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
    if iota:  # a range in this shape, transposed
        numbers = _iota(iota[1], iota[1], iota[2])
    elif ids:
        numbers = np.array([int(n) for n in re.findall(r"\d+", ids[: ids.rindex("{")])])
    shape, over = [], []
    chosen = {
        name: (int(before or 1), int(size or n)) for name, before, size, n in _chosen(text, sizes)
    }
    for name, n in sizes.items():
        before, size = chosen.get(name, (1, 1))
        over.append(len(shape) + 1)
        shape += [before, size, n // (before * size)]
    array = numbers.reshape(shape)
    rest = [i for i in range(len(shape)) if i not in over]
    return array.transpose(rest + over).reshape(-1, math.prod(shape[i] for i in over)).tolist()


def _chosen(text: str, sizes: Mapping[str, int]) -> Iterable[tuple[str, str, str, int]]:
    listed = text[text.rindex("{") :]
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", listed):
        yield name, before, size, sizes[name]


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    sizes = tuple(mesh.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes), axis=1)
        differ |= (places != places[0]).any(axis=0)
    return tuple(itertools.compress(mesh, differ))


def by_kind_and_axes(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends in a step."""
    totals: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    for own in collectives:
        totals[own.kind, own.axes] += own.total
    return dict(totals)


def gathered(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[int, ...]], float]:
    """Arrays that all-gathers form, as (dtype, shape), and how often in a step."""
    totals: dict[tuple[str, tuple[int, ...]], float] = collections.defaultdict(float)
    for own in collectives:
        if own.kind == "all-gather":
            for array in own.shapes:
                totals[array.dtype, array.dims] += own.times
    return dict(totals)
