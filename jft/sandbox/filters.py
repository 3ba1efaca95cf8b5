# SPDX-License-Identifier: Apache-2.0
"""Jinja's filters and tests within the limits, and the filters that `guard` puts in."""

import functools
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import jinja2

from jft.sandbox import budget, guard, operations

# Of web pages, or chance: no chat template needs them, and some take quadratic time.
_DROPPED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# They go through the characters of a text, which then are values each.
_OVER_ITEMS = frozenset(
    "batch dictsort groupby list map reject rejectattr reverse select selectattr slice sort sum unique".split()
)
_COMPARING = "== eq equalto ne != lt < lessthan le <= gt > greaterthan ge >= in".split()
_SMALL = 16  # characters of an indent or separator in JSON


def install(environment: jinja2.Environment) -> None:
    """Replaces an environment's filters and tests."""
    filters = environment.filters
    for name in _DROPPED:
        del filters[name]
    for name, function in list(filters.items()):
        filters[name] = _counted(function, name in _OVER_ITEMS)
    for name, make in _CHECKED.items():
        filters[name] = make(filters[name])
    filters |= {"tojson": tojson, "join": _join, "sum": _sum}
    filters |= {guard.TICK: _tick, guard.TICKED: _ticked, guard.MADE: _made, guard.PART: _part}
    filters |= {guard.CONCAT: _concat, guard.SHOWN: _shown}
    for name in _COMPARING:
        if name in environment.tests:
            environment.tests[name] = _counted(environment.tests[name], False)


def _counted(function: Callable[..., Any], over_items: bool) -> Callable[..., Any]:
    @functools.wraps(function)  # also its mark that it takes the context or environment
    def counted(*args: Any, **kwargs: Any) -> Any:
        limits = budget.now()
        limits.tick()
        if over_items:
            for each in args[:2]:
                if isinstance(each, str):
                    limits.allow(budget.ENTRY * len(each))
        return limits.made(function(*args, **kwargs))

    return counted


def _before(check: Callable[..., None]) -> Callable[[Any], Any]:
    def make(function: Any) -> Any:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return checked

    return make


def _check_center(text: Any, width: Any = 80) -> None:
    operations.check_width(width)


def _check_indent(text: str, width: Any = 4, *_: Any, **__: Any) -> None:
    if not isinstance(width, str):
        operations.check_width(width)
    size = len(width) if isinstance(width, str) else max(width, 0)
    budget.now().allow(len(text) + (str(text).count("\n") + 1) * size)


def _check_replace(_: Any, text: Any, old: Any, new: Any, count: Any = None) -> None:
    operations.check_replaced(str(text), str(old), str(new))


def _check_format(text: Any, *args: Any, **kwargs: Any) -> None:
    for given in (*args, *kwargs.values()) or ((),):
        operations.check_percent(str(text), given)


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 100:
        raise budget.Exceeded("rounds to more than 100 digits")


def _check_batch(value: Any, count: Any, fill: Any = None) -> None:
    operations.check_width(count)


def _check_slice(_: Any, value: Any, count: Any, fill: Any = None) -> None:
    operations.check_width(count)


def _listed(function: Any) -> Any:
    """A filter that gives lists one by one, as a list: each is counted before it is used."""

    @functools.wraps(function)
    def listed(*args: Any, **kwargs: Any) -> Any:
        return budget.now().made(list(_at_most(function(*args, **kwargs))))

    return listed


def _at_most(values: Any) -> Any:
    limits = budget.now()
    for count, value in zip(itertools.count(1), values, strict=False):
        limits.allow(budget.ENTRY * count)
        limits.tick()
        yield limits.made(value)


_CHECKED: dict[str, Callable[[Any], Any]] = {
    "center": _before(_check_center),
    "indent": _before(_check_indent),
    "replace": _before(_check_replace),
    "format": _before(_check_format),
    "round": _before(_check_round),
    "batch": lambda function: _listed(_before(_check_batch)(function)),
    "slice": lambda function: _listed(_before(_check_slice)(function)),
}


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it, without Jinja's escapes for web pages."""
    limits = budget.now()
    limits.tick()
    limits.allow(limits.weigh(x))
    wide = (
        isinstance(indent, int)
        and indent > _SMALL
        or isinstance(indent, str)
        and len(indent) > _SMALL
    )
    if wide or any(len(str(each)) > _SMALL for each in separators or ()):
        raise budget.Exceeded(f"writes JSON with an indent or separator beyond {_SMALL} characters")
    text = json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return limits.made(text)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    budget.now().tick()
    if attribute is not None:
        pick = functools.partial(_picked, environment, attribute)
        value = map(pick, value)
    return operations.joined(str(d), value)


def _picked(environment: jinja2.Environment, attribute: Any, item: Any) -> Any:
    for part in attribute.split(".") if isinstance(attribute, str) else [attribute]:
        item = environment.getitem(item, int(part) if str(part).isdigit() else part)
    return item


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Of numbers: a sum of lists takes quadratic time."""
    numbers = value if attribute is None else (_picked(environment, attribute, x) for x in value)
    total = start
    for number in numbers:
        if not isinstance(number, int | float) or not isinstance(total, int | float):
            raise TypeError("the filter sum adds numbers")
        budget.now().tick()
        total += number
    return total


@jinja2.pass_context  # so that it is not taken for a constant
def _tick(context: Any, value: Any) -> None:
    budget.now().tick()


def _ticked(value: Any) -> Any:
    budget.now().tick()
    return value


def _made(value: Any) -> Any:
    return budget.now().made(value)


def _part(value: Any) -> Any:
    """A slice: not larger than the whole, but a copy."""
    budget.now().charge(sys.getsizeof(value))
    return value


def _concat(values: list[Any]) -> str:
    limits = budget.now()
    texts = [value if isinstance(value, str) else _shown(value) for value in values]
    limits.allow(sum(map(len, texts)))
    text = "".join(texts)
    limits.charge(sys.getsizeof(text))
    return text


def _shown(value: Any) -> str:
    """As text, as Jinja prints it."""
    if isinstance(value, str):
        return value
    limits = budget.now()
    limits.tick()
    limits.allow(limits.weigh(value))
    return limits.made(str(value))
