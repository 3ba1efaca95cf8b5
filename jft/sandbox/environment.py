# SPDX-License-Identifier: Apache-2.0
"""Jinja's environment for chat templates: what transformers' has, within the limits."""

import datetime
import functools
import types
import warnings
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

from jft.sandbox import budget, filters, guard, operations

# Arguments that Jinja's compiler adds to calls inside loops and blocks.
_OF_JINJA = ("_loop_vars", "_block_vars")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which some templates put around what is trained: its contents."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Prints nothing of what it holds, which may be another one twice, and so on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dict(*args, **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace can't hold {name!r:.40}")


_OPEN = frozenset((*operations.PLAIN, jinja2.runtime.LoopContext, _Namespace))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    @staticmethod
    def concat(pieces: Any) -> str:
        """What macros and blocks gather."""
        return operations.joined("", pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is str and operator == "+":  # nearly all there are
            made = left + right
            budget.now().charge(len(made))
            return made
        operations.check_operator(operator, left, right)
        return budget.now().made(self.binop_table[operator](left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) in _OPEN:  # calls of their methods are looked at one by one
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, types.BuiltinMethodType):
            return None
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            operations.check_format(value.__self__, args, kwargs)
            return inner(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        limits = budget.now()
        limits.tick()
        if isinstance(__obj, types.BuiltinMethodType):
            for name in _OF_JINJA:
                kwargs.pop(name, None)
            return limits.made(operations.call_method(__obj, args, kwargs))
        # A macro holds what it was given, in varargs and kwargs.
        own = (value for name, value in kwargs.items() if name not in _OF_JINJA)
        limits.allow(sum(map(limits.weigh, (*args, *own))))
        return limits.made(super().call(__context, __obj, *args, **kwargs))


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@functools.cache
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    filters.install(made)
    del made.globals["lipsum"]
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _Namespace,
    }
    return made


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template by its text.

    Raises:
      jinja2.TemplateSyntaxError, and what Python's compiler raises: it is none.
      budget.Exceeded: it uses statements that are not available.
    """
    environment = _environment()
    with budget.limits(), warnings.catch_warnings():  # constants are computed now
        warnings.simplefilter("ignore", SyntaxWarning)
        return environment.from_string(guard.guarded(environment.parse(source)))
