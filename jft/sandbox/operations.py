# SPDX-License-Identifier: Apache-2.0
"""Operators and methods of Python's types, asked for the size of their result before they run."""

import re
import string
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jft.sandbox import budget

WIDEST = 10_000  # of a padded text
_BITS = 4096  # of a whole number
_SEQUENCES = (str, bytes, list, tuple)
_PERCENT = re.compile(r"[-#0 +]*(?:\*|\d*)(?:\.(?:\*|\d*))?")  # flags, width, precision

# Methods that only look, or give pieces of what there is.
PLAIN: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower"
        " isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex"
        " rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("copy count index".split()),
    tuple: frozenset("count index".split()),
    int: frozenset("bit_count bit_length is_integer".split()),
    float: frozenset(("is_integer",)),
}


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result would be too large.

    Raises:
      budget.Exceeded: it would.
    """
    if operator == "*":
        _check_product(left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str | bytes):
        check_percent(left, right)
    elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
        limits = budget.now()
        limits.allow(limits.weigh(left) + limits.weigh(right))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for held, count in ((left, right), (right, left)):
        if isinstance(held, _SEQUENCES) and isinstance(count, int):
            limits = budget.now()
            limits.allow(limits.weigh(held) * max(count, 0))


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise budget.Exceeded(f"makes a number of more than {_BITS} bits")


def check_percent(text: Any, given: Any) -> None:
    """Of `text % given`."""
    if isinstance(text, bytes):
        raise budget.Exceeded("formats bytes")
    budget.now().allow(budget.ENTRY * text.count("%"))
    specs = [found[0] for at in _percents(text) if (found := _PERCENT.match(text, at))]
    _check_formatted(text, specs, [given])


def _percents(text: str) -> Iterator[int]:
    """Where the flags of each % begin: after its key, in which parentheses come in pairs."""
    at = text.find("%")
    while at >= 0:
        at += 1
        if text.startswith("(", at):
            at = _after_parentheses(text, at)
        yield at
        at = text.find("%", at + text.startswith("%", at))


def _after_parentheses(text: str, at: int) -> int:
    depth = 0
    for end in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if not depth:
            return end + 1
    return len(text)


def check_format(text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Of `text.format(...)`."""
    budget.now().allow(budget.ENTRY * text.count("{"))
    parsed = string.Formatter().parse(text)
    fields = [spec or "" for _, name, spec, _ in parsed if name is not None]
    _check_formatted(text, fields, [*args, *kwargs.values()])


def _check_formatted(text: str, specs: Sequence[str], given: Sequence[Any]) -> None:
    """Refuses widths and precisions that are large or arguments, and the largest value in all places."""
    limits = budget.now()
    largest = max((limits.weigh(value) for value in given), default=0)
    size = len(text) + len(specs) * largest
    for spec in specs:
        widths = [int(width) for width in re.findall(r"\d{1,20}", spec)]
        if "*" in spec or "{" in spec or max(widths, default=0) > WIDEST:
            raise budget.Exceeded(
                f"formats a value to a width that is an argument or above {WIDEST:,}"
            )
        size += sum(widths)
    limits.allow(size)


def check_width(width: Any) -> None:
    """Raises budget.Exceeded for a width that is no small number."""
    if not isinstance(width, int) or width > WIDEST:
        raise budget.Exceeded(f"pads a text to {width!r:.20} characters: more than {WIDEST}")


def check_replaced(text: str, old: str, new: str) -> None:
    """Of `text.replace(old, new)`."""
    if len(new) > len(old):
        limits = budget.now()
        count = text.count(old) if old else len(text) + 1
        limits.allow(limits.weigh(text) + count * limits.weigh(new))


def joined(separator: str, parts: Any) -> str:
    """separator.join(parts as text), measured first."""
    limits = budget.now()
    texts, size = [], 0
    for part in parts:
        text = part if isinstance(part, str) else str(part)
        size += len(text) + len(separator)
        limits.allow(size)
        limits.tick()
        texts.append(text)
    return limits.made(separator.join(texts))


def call_method(method: types.BuiltinMethodType, args: Sequence[Any], kwargs: Any) -> Any:
    """A call of a method of one of Python's types.

    Raises:
      budget.Exceeded: its result would be too large, or it is none that templates need.
    """
    owner, name = method.__self__, method.__name__
    kind = type(owner)
    if kind in PLAIN and name in PLAIN[kind]:
        return method(*args, **kwargs)
    if isinstance(owner, str) and not kwargs:
        if name == "join" and len(args) == 1:
            return joined(str(owner), _texts(args[0]))
        if name == "replace" and len(args) >= 2 and all(isinstance(x, str) for x in args[:2]):
            check_replaced(str(owner), args[0], args[1])
            return method(*args)
        if name in ("center", "ljust", "rjust", "zfill") and args:
            check_width(args[0])
            return method(*args)
        if name == "expandtabs":
            check_width(args[0] if args else 8)
            check_replaced(str(owner), "\t", " " * (args[0] if args else 8))
            return method(*args)
    raise budget.Exceeded(f"calls {type(owner).__name__}.{name}, which is not available")


def _texts(parts: Any) -> Any:
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"join of {type(part).__name__}, not of texts")
        yield part
