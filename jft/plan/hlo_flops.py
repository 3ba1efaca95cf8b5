# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of matrix products that a program executes on one device, read from its optimised HLO.

Counted are dots, convolutions (what TPU makes of dots), library calls for them, and kernels that state theirs; all else
(softmax, norms, the optimizer) is left out, as it is from "model flops". `cost_analysis()` counts a loop's body once and
leaves kernels out; here each instruction counts as often as it runs.

A kernel is opaque: it states its flops in a name scope around its call, which survives differentiation and compilation:
`jax.named_scope("jft_kernel_flops_{forward}_dkv_{n}_dq_{m}")`. The first number is what one call executes on one device;
the number behind a word is that of the scope's kernels whose own name holds the word.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from jft.plan import hlo_text, hlo_trips

Operands = Sequence[hlo_text.Shape]
Formula = Callable[[Operands, str], int]  # (shapes of the operands, op_name) -> flops of one call

_STATED = re.compile(r"jft_kernel_flops_(\d+)((?:_[a-z]+_\d+)*)")
_GEMM = re.compile(r"__cublas\$(gemm|lt\$matmul)|__onednn\$matmul")
_KERNEL = re.compile(
    r"tpu_custom_call|mosaic|triton|fmha|__cudnn\$conv|flash|attention", re.IGNORECASE
)
REMATERIALISED, BACKWARD, FORWARD = "recomputation", "backward", "forward"


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction and how often it runs in a call of the program."""

    own: hlo_text.Instruction
    computation: hlo_text.Computation
    times: float
    within: tuple[hlo_text.Instruction, ...]  # fusions, loops and calls around it, outermost first


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or a kernel's call."""

    name: str
    op_name: str
    source: str  # file:line
    result: str
    flops: int  # of one execution
    times: float

    @property
    def total(self) -> float:
        return self.flops * self.times

    @property
    def part(self) -> str:
        """Of which part of the step: jax.checkpoint and jax.grad mark what they make."""
        if "rematted_computation" in self.op_name:
            return REMATERIALISED
        return BACKWARD if "transpose(" in self.op_name else FORWARD


@dataclasses.dataclass(frozen=True)
class Flops:
    """What a program executes on one device; `uncounted` must be empty for the total to be true."""

    products: tuple[Product, ...]
    uncounted: tuple[str, ...]  # findings, one line each
    stated: tuple[str, ...]  # loops counted by their scope: at most as often

    @property
    def total(self) -> float:
        return sum(own.total for own in self.products)

    def by_part(self) -> dict[str, float]:
        return {
            part: sum(own.total for own in self.products if own.part == part)
            for part in (FORWARD, REMATERIALISED, BACKWARD)
        }


class Walk:
    """Goes through what a module executes; conditionals take their dearest branch unless told otherwise."""

    def __init__(
        self,
        module: hlo_text.Module,
        kernels: Mapping[str, Formula] | None = None,
        branches: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """
        Args:
          module: the program.
          kernels: pattern of a kernel's name or target -> its flops, for kernels that state none.
          branches: pattern of a conditional's op_name -> the share of executions that takes each branch.
        """
        self.module = module
        self.kernels = dict(kernels or {})
        self.branches = dict(branches or {})
        self.trips = hlo_trips.Counter(module)
        self._costs: dict[str, float] = {}

    def steps(self) -> Iterator[Step]:
        """All instructions that run, those within fusions too. A loop whose trips nobody knows counts once: see `flops`."""
        yield from self._steps(self.module.entry, 1.0, ())

    def _steps(
        self,
        computation: hlo_text.Computation,
        times: float,
        within: tuple[hlo_text.Instruction, ...],
    ) -> Iterator[Step]:
        for own in computation.instructions:
            yield Step(own, computation, times, within)
            for called, share in self._calls(own):
                if share:
                    yield from self._steps(
                        self.module.computations[called], times * share, (*within, own)
                    )

    def _calls(self, own: hlo_text.Instruction) -> list[tuple[str, float]]:
        """Computations that an instruction executes, and how often. Reducers and comparators hold no products."""
        if own.opcode == "while":
            count = self.trips.trips(own).count
            count = 1 if count is None else count
            return [(own.computation("body"), count), (own.computation("condition"), count + 1)]
        if own.opcode == "conditional":
            return list(zip(own.called, self._shares(own), strict=True))
        if own.opcode in ("fusion", "call"):
            return [(name, 1.0) for name in own.called]
        if own.opcode.endswith("-start") and "calls" in own.attributes:
            return [(own.computation("calls"), 1.0)]
        return []

    def _shares(self, own: hlo_text.Instruction) -> Sequence[float]:
        for pattern, shares in self.branches.items():
            if re.search(pattern, own.op_name):
                return shares
        costs = [self._cost(name) for name in own.called]
        dearest = costs.index(max(costs))
        return [float(i == dearest) for i in range(len(costs))]

    def _cost(self, name: str) -> float:
        if name not in self._costs:
            computation = self.module.computations[name]
            self._costs[name] = sum(
                (self.of(own, computation) or 0)
                + sum(share * self._cost(called) for called, share in self._calls(own))
                for own in computation.instructions
            )
        return self._costs[name]

    def of(self, own: hlo_text.Instruction, computation: hlo_text.Computation) -> int | None:
        """Flops of one execution of an instruction itself: 0 for what is no product, None for a kernel that states none."""
        shapes = [one.shape for one in computation.inputs(own)]
        if own.opcode == "dot":
            return _dot(own, shapes)
        if own.opcode == "convolution":
            return _convolution(own, shapes)
        if own.opcode == "ragged-dot":
            return _ragged(own, shapes)
        return self._custom_call(own, shapes) if own.opcode == "custom-call" else 0

    def _custom_call(self, own: hlo_text.Instruction, shapes: Operands) -> int | None:
        target = own.attributes["custom_call_target"].strip('"')
        names = (own.name, target, *own.op_name.split("/")[-2:])
        for pattern, formula in self.kernels.items():
            if any(re.search(pattern, name) for name in names):
                return formula(shapes, own.op_name)
        if _GEMM.search(target):
            return _gemm(own, shapes)
        # Only a kernel: buffers that are allocated within the scope are custom calls as well.
        return _stated(own.op_name, names) if _KERNEL.search(target) else 0


def count(walk: Walk) -> Flops:
    """The products that a program executes, and what could not be counted."""
    products, uncounted, stated = [], [], []
    for step in walk.steps():
        own = step.own
        if own.opcode == "while":
            trips = walk.trips.trips(own)
            where = f"{own.name} ({own.op_name or 'no op_name'})"
            if trips.count is None:
                uncounted.append(f"{where}: a loop whose trips nothing tells, counted once")
            elif trips.stated:
                stated.append(f"{where}: at most {trips.count} trips, as its scope says")
        flops = walk.of(own, step.computation)
        if flops is None:
            uncounted.append(
                f"{own.name} ({own.op_name or 'no op_name'}): a kernel that states no flops"
            )
        elif flops:
            source = walk.module.frames.get(own.frame or -1, "")
            first = next(hlo_text.leaves(own.shape))
            products.append(Product(own.name, own.op_name, source, str(first), flops, step.times))
    return Flops(tuple(products), tuple(dict.fromkeys(uncounted)), tuple(dict.fromkeys(stated)))


def _stated(op_name: str, names: Sequence[str]) -> int | None:
    """What the innermost scope around a kernel says."""
    scopes = list(_STATED.finditer(op_name))
    if not scopes:
        return None
    found = scopes[-1]
    own = " ".join(names).lower()
    for word, number in re.findall(r"_([a-z]+)_(\d+)", found[2]):
        if word in own:
            return int(number)
    return int(found[1])


def _dims(shape: hlo_text.Shape) -> tuple[int, ...]:
    return next(hlo_text.leaves(shape)).dims


def _listed(own: hlo_text.Instruction, key: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", own.attributes.get(key, ""))]


def _dot(own: hlo_text.Instruction, shapes: Operands) -> int:
    left = _dims(shapes[0])
    contracted = math.prod(left[i] for i in _listed(own, "lhs_contracting_dims"))
    return 2 * math.prod(_dims(own.shape)) * contracted


def _ragged(own: hlo_text.Instruction, shapes: Operands) -> int:
    """Each row meets one group's matrix."""
    left = _dims(shapes[0])
    return (
        2
        * math.prod(_dims(own.shape))
        * math.prod(left[i] for i in _listed(own, "lhs_contracting_dims"))
    )


def _gemm(own: hlo_text.Instruction, shapes: Operands) -> int:
    """cuBLAS calls have the dot's dimensions in their configuration; oneDNN's take plain matrices."""
    left = _dims(shapes[0])
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', own.rest)
    contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else [len(left) - 1]
    return 2 * math.prod(_dims(own.shape)) * math.prod(left[i] for i in contracted)


def _convolution(own: hlo_text.Instruction, shapes: Operands) -> int:
    """A convolution multiplies at valid positions only.

    TPU turns a dot's free dimension into a window that slides over padding: window times output would count it many times over.
    """
    left, kernel, result = own.attributes["dim_labels"].replace("->", "_").split("_")
    sizes = [
        dict(zip(labels, _dims(shape), strict=True))
        for labels, shape in ((left, shapes[0]), (kernel, shapes[1]), (result, own.shape))
    ]
    window = _window(own.attributes.get("window", "{}"))
    spatial = sorted(label for label in kernel if label.isdigit())
    positions = math.prod(
        _positions(sizes[0][label], sizes[2][label], sizes[1][label], *window(int(label)))
        for label in spatial
    )
    groups = int(own.attributes.get("batch_group_count", 1))
    return 2 * (sizes[0]["b"] // groups) * sizes[1]["o"] * sizes[1]["i"] * positions


def _window(text: str) -> Callable[[int], tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the input, dilation of the kernel) of a spatial dimension."""
    fields = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", text)}

    def of(i: int) -> tuple[int, int, int, int]:
        pads = fields.get("pad")
        before = int(pads[i].split("_")[0]) if pads else 0
        stride, left, right = (
            int(fields[key][i]) if key in fields else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        return stride, before, left, right

    return of


@functools.lru_cache(maxsize=4096)
def _positions(
    size: int, out: int, kernel: int, stride: int, before: int, left: int, right: int
) -> int:
    """Pairs of output and kernel position that meet an element of the input, not padding or a gap of dilation."""
    extent = (size - 1) * left + 1
    met = 0
    for k in range(kernel):
        offset = k * right - before  # the input's place of output position 0
        first, last = max(0, -(offset // stride)), min(out - 1, (extent - 1 - offset) // stride)
        if left == 1:
            met += max(0, last - first + 1)
        else:
            met += sum((o * stride + offset) % left == 0 for o in range(first, last + 1))
    return met
