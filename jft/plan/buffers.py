# SPDX-License-Identifier: Apache-2.0
"""What lies in a device's memory, in words: buffers of a compiled step by what they are for."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

from jft import tree
from jft.models import architecture, decoder
from jft.plan import hlo_memory

# Roots of the steps' arguments, and of what they are.
_ROOTS = (
    (r"(state\.)?opt_state.*\.mu\b", "first moment of"),
    (r"(state\.)?opt_state.*\.nu\b", "second moment of"),
    (r"(state\.trainable|adapters|trainable).*\['[^']*/[^']*'\]", "adapter of"),
    (r"frozen|params|state\.trainable|trainable", "weights"),
    (r"batch", "batch"),
    (r"state", "counters"),
)
_FACTORS = {".a": "A", ".b": "B", ".magnitude": "magnitude"}


@dataclasses.dataclass(frozen=True)
class Named:
    """A buffer, or several alike."""

    name: str
    shape: str
    bytes: int  # of all of them
    count: int = 1

    def __str__(self) -> str:
        many = f"{self.count} of " if self.count > 1 else ""
        return f"{self.name}, {many}{self.shape}: {gigabytes(self.bytes)}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def largest(peak: hlo_memory.Peak, model: architecture.Config, count: int) -> list[Named]:
    """The largest buffers at the peak, equal ones together.

    Args:
      peak: of a program.
      model: whose step it is.
      count: how many to name.
    """
    parts = {one.shape: argument(one.name) for one in peak.buffers if one.what == "argument"}
    whole = _layer_shapes(model)
    found: dict[tuple[str, str], Named] = {}
    for one in peak.buffers:
        name = _name(one, model.num_layers, parts, whole)
        before = found.get((name, one.shape), Named(name, one.shape, 0, 0))
        found[name, one.shape] = Named(name, one.shape, before.bytes + one.bytes, before.count + 1)
    return sorted(found.values(), key=lambda one: -one.bytes)[:count]


def _layer_shapes(model: architecture.Config) -> dict[str, str]:
    """Dimensions of one layer's whole weights, as text -> which those are."""
    names: dict[str, list[str]] = {}
    for path, leaf in tree.flatten(decoder.shapes(model)["layers"]).items():
        names.setdefault(",".join(map(str, leaf.shape[1:])), []).append(path)
    return {dims: " or ".join(paths) for dims, paths in names.items() if "," in dims}


def by_use(peak: hlo_memory.Peak) -> dict[str, int]:
    """Bytes at the peak: of weights, adapters, moments, the batch, and of what only the step needs."""
    totals: dict[str, int] = {}
    for one in peak.buffers:
        use = "temporaries"
        if one.what == "argument":
            use = argument(one.name).partition(" ")[0]
            use = {"first": "moments", "second": "moments", "adapter": "adapters"}.get(use, use)
        totals[use] = totals.get(use, 0) + one.bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def argument(name: str) -> str:
    """`frozen['layers']['mlp']['up']['kernel']` -> weights layers/mlp/up/kernel."""
    what = next((words for pattern, words in _ROOTS if re.match(pattern, name)), "")
    path = "/".join(re.findall(r"\['([^']+)'\]", name))
    factor = next((f" {words}" for end, words in _FACTORS.items() if name.endswith(end)), "")
    return f"{what} {path}{factor}" if what and path else what or name


def _name(
    one: hlo_memory.Buffer, layers: int, parts: Mapping[str, str], whole: Mapping[str, str]
) -> str:
    if one.what == "argument":
        return argument(one.name)
    if not one.op_name and one.shape in parts:
        return f"a copy of {parts[one.shape]}"
    dims = one.shape.partition("[")[2].rstrip("]")
    if not one.op_name and dims.removeprefix("1,") in whole:
        return f"a layer's whole {whole[dims.removeprefix('1,')]}"
    if "at_most_" in one.op_name:
        return f"of the cross-entropy ({_operation(one)})"
    # What the loop over layers stacked has them on its first dimension.
    if dims.startswith(f"{layers},") and "transpose(" not in one.op_name:
        return f"kept of each layer for the backward pass ({_operation(one)})"
    if one.what == "result":
        return f"a result ({_operation(one)})"
    backward = "transpose(" in one.op_name
    return f"of the {'backward' if backward else 'forward'} pass ({_operation(one)})"


def _operation(one: hlo_memory.Buffer) -> str:
    """What makes it and where: the operation's last scopes, and its line of source."""
    scopes: Sequence[str] = [part for part in one.op_name.split("/") if part]
    told = scopes[-1] if scopes else re.sub(r"[.\d]+$", "", one.name)
    path, _, line = one.source.rpartition(":")
    parts = pathlib.PurePath(path).parts
    where = "/".join(parts[-2:]) + f":{line}" if path else ""
    return f"{told} at {where}" if where else told
