# SPDX-License-Identifier: Apache-2.0
"""Answers as JSON: valid, of a schema, with the right fields."""

import collections
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jft import errors
from jft.evals import matching, result

Answers = matching.Answers
Leaves = collections.Counter[tuple[str, Any]]


class _NoJson(ValueError):
    pass


def parse(text: str) -> Any:
    """The one JSON value that a text is, with nothing around it. Raises ValueError (NaN is no JSON either)."""

    def refuse(name: str) -> Any:
        raise _NoJson(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise _NoJson("nested too deeply") from error


def _is_json(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def valid(answers: Answers) -> result.Result:
    """One JSON value and nothing else, no fence of ``` either: what a program can read."""
    return result.mean("json", [_is_json(a.text) for a in answers])


def keys(answers: Answers) -> result.Result:
    """One JSON value of the reference's kind; if that is an object, with exactly its keys."""

    def right(a: result.Answer) -> bool:
        wanted = _reference(a, "json_keys")
        return _is_json(a.text) and _keys(parse(a.text)) == _keys(wanted)

    return result.mean("json_keys", [right(a) for a in answers])


def _keys(value: Any) -> Any:
    return set(value) if isinstance(value, dict) else type(value)


def _reference(a: result.Answer, score: str) -> Any:
    try:
        return parse(a.reference)
    except ValueError as error:
        raise errors.UserError(
            f"score {score}: a reference is not JSON: {a.reference[:80]!r} ({error})"
        ) from error


def schema(argument: str) -> Callable[[Answers], result.Result]:
    """`json_schema:FILE`: valid by a JSON Schema of any draft; references to other files or hosts are not followed.

    Raises:
      UserError: the file cannot be read, is no schema, or refers to what is outside it.
    """
    validator = _validator(argument)

    def right(a: result.Answer) -> bool:
        import referencing.exceptions

        try:
            return _is_json(a.text) and validator.is_valid(parse(a.text))
        except referencing.exceptions.Unresolvable as error:
            raise errors.UserError(
                f"score json_schema:{argument}: $ref {error.ref!r} is not in the file; put it under $defs"
            ) from error

    return lambda answers: result.mean("json_schema", [right(a) for a in answers])


def _validator(path: str) -> Any:
    import jsonschema
    import referencing

    where = f"score json_schema:{path}"
    try:
        wanted = parse(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.UserError(
            f"{where}: {error.strerror or error}; give a schema's file"
        ) from error
    except ValueError as error:
        raise errors.UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(wanted, dict | bool):
        raise errors.UserError(f"{where}: a schema is an object, this is {type(wanted).__name__}")
    kind = jsonschema.validators.validator_for(wanted, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise errors.UserError(f"{where}: no JSON Schema: {error.message}") from error
    # An empty registry: by default jsonschema would fetch what a schema refers to.
    return kind(wanted, registry=referencing.Registry())


def field_f1(answers: Answers) -> result.Result:
    """F1 over the fields of JSON answers, all examples' together (micro); `details` has each field's own.

    A field is a path and its value, as `items[].price` and 3. The order of a list does not count. Text is compared without
    white space at its ends, numbers as numbers. An answer that is not JSON has no field.
    """
    parts, by_field = [], collections.defaultdict(lambda: np.zeros(3))
    for a in answers:
        wanted = _leaves(_reference(a, "field_f1"))
        got = _leaves(parse(a.text)) if _is_json(a.text) else collections.Counter()
        parts.append([(got & wanted).total(), got.total(), wanted.total()])
        for column, some in enumerate((got & wanted, got, wanted)):
            for (path, _), count in some.items():
                by_field[path][column] += count
    counts = np.array(parts, np.float64).reshape(-1, 3)
    details = {
        "precision": _share(counts[:, 0].sum(), counts[:, 1].sum()),
        "recall": _share(counts[:, 0].sum(), counts[:, 2].sum()),
        "fields": {path: float(_f1(sums)) for path, sums in sorted(by_field.items())},
    }
    return result.Result("field_f1", _f1(counts), counts, _f1, details=details)


def _share(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def _f1(sums: np.ndarray) -> np.ndarray:
    """2 right / (given + wanted); 1 where nothing is wanted and nothing given."""
    both = sums[..., 1] + sums[..., 2]
    return np.where(both > 0, 2 * sums[..., 0] / np.maximum(both, 1), 1.0)


def _leaves(value: Any) -> Leaves:
    return collections.Counter(_walk(value, ""))


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _walk(inner, f"{path}[]")
    else:
        yield path, _leaf(value)


def _leaf(value: Any) -> Any:
    """A value that equals what it should: True is not 1, but 1 is 1.0; an empty list is not an empty object."""
    if isinstance(value, bool | dict | list) or value is None:
        return (type(value).__name__, str(value))
    return value.strip() if isinstance(value, str) else value
