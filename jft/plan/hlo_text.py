# SPDX-License-Identifier: Apache-2.0
"""Reads the text of an optimised HLO module (`compiled.as_text()`): computations, instructions, shapes with their layout.

Only what counting needs is understood: the rest of an instruction stays text until somebody asks for an attribute.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

DEVICE, HOST = (
    0,
    5,
)  # memory spaces, S(n) in a layout: device memory has no mark; 1 and above (not 5) are on the chip itself

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\(|\)|([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_STARTS = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPENS = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\](),]')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array: element type, dimensions, and where and how they lie in memory."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = DEVICE
    packed_bits: int = 0

    @functools.cached_property
    def bits(self) -> int:
        """Of one element."""
        if self.packed_bits:
            return self.packed_bits
        return _BITS.get(self.dtype) or _bits_in_name(self.dtype)

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Without the padding of tiles: what a collective sends."""
        return -(-self.elements * self.bits // 8)

    @functools.cached_property
    def padded_bytes(self) -> int:
        """With it: what a buffer takes. The first tile covers the most minor dimensions; later ones only permute."""
        if not self.tiles:
            return self.bytes
        tile = self.tiles[0]
        major_to_minor = [self.dims[i] for i in reversed(self.minor_to_major)]
        major_to_minor = [1] * (len(tile) - len(major_to_minor)) + major_to_minor
        kept = len(major_to_minor) - len(tile)
        inner = [-(-n // t) * t for n, t in zip(major_to_minor[kept:], tile, strict=True)]
        return -(-math.prod((*major_to_minor[:kept], *inner)) * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bits_in_name(dtype: str) -> int:
    found = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(found[1]) if found else 0


Shape = Array | tuple["Shape", ...]


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@functools.lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """`f32[8,128]{1,0:T(8,128)}`, or a tuple of shapes in parentheses."""
    stack: list[list[Shape]] = [[]]
    for token in _SHAPE.finditer(text):
        if token[0] == "(":
            stack.append([])
        elif token[0] == ")":
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            stack[-1].append(_array(token[1], token[2], token[3] or ""))
    return stack[0][0]


def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, marks = layout.partition(":")
    tiled = re.search(r"T((?:\([^()]*\))+)", marks)
    tiles = re.findall(r"\(([^()]*)\)", tiled[1]) if tiled else ()
    space, packed = re.search(r"S\((\d+)\)", marks), re.search(r"E\((\d+)\)", marks)
    return Array(
        dtype=dtype,
        dims=_numbers(dims),
        minor_to_major=_numbers(order),
        tiles=tuple(_numbers(tile) for tile in tiles),
        space=int(space[1]) if space else DEVICE,
        packed_bits=int(packed[1]) if packed else 0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `operands` are names within its computation, `rest` is all that follows them."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    rest: str
    is_root: bool

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        return dict(_attributes(self.rest))

    @functools.cached_property
    def op_name(self) -> str:
        """The name scopes of the JAX operation that this came from; empty for what the compiler made."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it calls, however it calls them; reducers of a reduce too."""
        keys = (
            "calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
        )
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", _QUOTED.sub('""', self.rest))
        return tuple(name for text in found for name in re.findall(r"[\w.\-]+", text))

    def computation(self, key: str) -> str:
        """The computation under one attribute."""
        return self.attributes[key].lstrip("%")

    @property
    def frame(self) -> int | None:
        found = re.search(r"stack_frame_id=(\d+)", self.rest)
        return int(found[1]) if found else None


def _attributes(rest: str) -> Iterator[tuple[str, str]]:
    depth, start = 0, 0
    for mark in [*_MARKS.finditer(rest), None]:
        if mark is None or (mark[0] == "," and not depth):
            key, _, value = rest[start : mark.start() if mark else None].strip().partition("=")
            if key:
                yield key, value
            start = mark.end() if mark else 0
        elif mark[0] in "{[(":
            depth += 1
        elif mark[0] in "}])":
            depth -= 1


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which is that of execution in a scheduled module."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {own.name: own for own in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next(own for own in self.instructions if own.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(own.literal): own for own in self.instructions if own.opcode == "parameter"}

    def inputs(self, own: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in own.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program for one device."""

    header: str
    entry: Computation
    computations: dict[str, Computation]
    preamble: str  # tables of source lines, between the header and the first computation

    @functools.cached_property
    def scheduled(self) -> bool:
        return "is_scheduled=true" in self.header

    @functools.cached_property
    def partitions(self) -> int:
        """Devices that run it together: those of one slice."""
        found = re.search(r"num_partitions=(\d+)", self.header)
        return int(found[1]) if found else 1

    @functools.cached_property
    def donated(self) -> dict[int, int]:
        """Output -> parameter whose buffer it takes."""
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\d*\}, (?:may|must)-alias\)", self.header)
        return {int(output or 0): int(parameter) for output, parameter in pairs}

    @functools.cached_property
    def frames(self) -> dict[int, str]:
        """Stack frame -> file:line."""
        files = {
            int(n): name
            for n, name in re.findall(r'^(\d+) "(.*)"$', self._table("FileNames"), re.M)
        }
        lines = re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", self._table("FileLocations"), re.M
        )
        places = {int(n): f"{files[int(file)]}:{line}" for n, file, line in lines}
        frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", self._table("StackFrames"), re.M)
        return {int(n): places[int(place)] for n, place in frames}

    def _table(self, title: str) -> str:
        found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", self.preamble, re.M | re.S)
        return found[1] if found else ""


def parse(text: str) -> Module:
    """The module of a text.

    Raises:
      ValueError: it is not the text of an HLO module.
    """
    if not text.startswith("HloModule"):
        raise ValueError("not the text of an HLO module")
    header, _, body = text.partition("\n")
    computations, entry, preamble = {}, None, ""
    for is_entry, name, lines, before in _blocks(body):
        preamble = preamble or before
        computations[name] = Computation(name, tuple(map(_instruction, lines)))
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("the module has no ENTRY computation")
    return Module(header, computations[entry], computations, preamble)


def _blocks(body: str) -> Iterator[tuple[bool, str, list[str], str]]:
    """Computations as (is the entry, name, texts of instructions, what stood before the first)."""
    name, is_entry, held, before = "", False, [], []
    for line in body.split("\n"):
        if not name:
            opened = _OPENS.match(line)
            if opened:
                is_entry, name, held = bool(opened[1]), opened[2], []
            else:
                before.append(line)
        elif _STARTS.match(line):
            held.append(line)
        elif line.startswith("}") and (not held or _balanced(held[-1])):
            yield is_entry, name, held, "\n".join(before)
            name, before = "", []
        elif held:  # a kernel's metadata may hold line breaks
            held[-1] += "\n" + line


def _balanced(text: str) -> bool:
    bare = _QUOTED.sub("", text)
    return bare.count("{") == bare.count("}")


def _instruction(line: str) -> Instruction:
    opened = _STARTS.match(line)
    assert opened
    shape_end = (
        _closing(line, opened.end()) if line[opened.end()] == "(" else line.index(" ", opened.end())
    )
    shape, after = line[opened.end() : shape_end], line[shape_end:].lstrip()
    opcode, _, _ = after.partition("(")
    end = _closing(after, len(opcode))
    literal = after[len(opcode) + 1 : end - 1]
    bare = re.sub(r"/\*.*?\*/", "", literal)
    operands = () if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", bare)
    return Instruction(
        name=opened[2],
        shape=parse_shape(shape),
        opcode=opcode,
        operands=tuple(operands),
        literal=literal,
        rest=after[end:].lstrip(", "),
        is_root=bool(opened[1]),
    )


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for mark in _MARKS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if not depth and mark[0] == ")":
            return mark.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
