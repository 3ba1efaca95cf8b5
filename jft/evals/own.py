# SPDX-License-Identifier: Apache-2.0
"""A user's own score: `FILE.py:FUNCTION`, called as function(prompt, reference, answer) for each example.

It returns a number or a truth value; the score is the mean.
"""

import importlib.util
import inspect
import math
import numbers
import pathlib
from collections.abc import Callable
from typing import Any

from jft import errors
from jft.evals import matching, result

CALL = "function(prompt, reference, answer)"


def score(spec: str) -> Callable[[matching.Answers], result.Result]:
    """The score of `FILE.py:FUNCTION`.

    Raises:
      UserError: the file or the function is not there or cannot be used; when measured: it fails, or gives no number.
    """
    path, _, name = spec.rpartition(":")
    function = _load(spec, path, name)

    def measure(answers: matching.Answers) -> result.Result:
        values = [_value(spec, path, function, i, a) for i, a in enumerate(answers, 1)]
        inside = all(0 <= v <= 1 for v in values)
        return result.mean(spec, values, unit="share" if inside else "")

    return measure


def _load(spec: str, path: str, name: str) -> Callable[..., Any]:
    where = f"score {spec}"
    if not path.endswith(".py") or not name:
        raise errors.UserError(f"{where}: write FILE.py:FUNCTION")
    if not pathlib.Path(path).is_file():
        raise errors.UserError(f"{where}: no such file: {path}")
    module_spec = importlib.util.spec_from_file_location("jft_user_score", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise errors.UserError(f"{where}: {_reason(error, path)}") from error
    function = getattr(module, name, None)
    if function is None:
        there = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise errors.UserError(
            f"{where}: {path} has no {name}; it has {', '.join(there) or 'no function'}"
        )
    if not callable(function):
        raise errors.UserError(f"{where}: {name} is {type(function).__name__}, no {CALL}")
    _check_parameters(where, name, function)
    return function


def _check_parameters(where: str, name: str, function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise errors.UserError(f"{where}: {name} is async; write a plain {CALL}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        signature.bind("", "", "")
    except TypeError as error:
        raise errors.UserError(
            f"{where}: {name}{signature} cannot be called as {CALL}: {error}"
        ) from error


def _value(spec: str, path: str, function: Any, number: int, a: result.Answer) -> float:
    where = f"score {spec}: answer {number}"
    try:
        found = function(a.prompt, a.reference, a.text)
    except Exception as error:
        raise errors.UserError(f"{where}: {_reason(error, path)}") from error
    # A numpy scalar is a Real too, but for its truth value.
    if type(found).__name__ in ("bool", "bool_"):
        return float(found)
    if not isinstance(found, numbers.Real) or not math.isfinite(found):
        raise errors.UserError(f"{where}: gives {found!r:.80}; return a finite number or a bool")
    return float(found)


def _reason(error: Exception, path: str) -> str:
    """The exception on one line, with the last line of the user's file that it passed."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    text = " ".join(str(error).split())[:200]
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {text}"
