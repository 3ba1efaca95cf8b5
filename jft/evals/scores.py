# SPDX-License-Identifier: Apache-2.0
"""Scores of one answer against its reference, each True or False."""

import json
from typing import Any

from jft import errors

FORMATS = ("", "json")


def exact_match(answer: str, reference: str) -> bool:
    """Equal, but for white space at both ends."""
    return answer.strip() == reference.strip()


def valid_format(answer: str, reference: str, kind: str) -> bool:
    """Whether the answer has the reference's form.

    Args:
      answer: the model's text.
      reference: the wanted text.
      kind: "" (anything will do) or "json": one JSON value and nothing else; if the reference is an object, an
        object with exactly its keys.

    Raises:
      UserError: the reference itself is not JSON.
    """
    if not kind:
        return True
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        raise errors.UserError(
            f"validate.format=json, but a reference is not JSON: {reference[:80]!r} ({error})"
        ) from error
    try:
        got = json.loads(answer)
    except ValueError:
        return False
    return _keys(got) == _keys(wanted)


def _keys(value: Any) -> Any:
    return set(value) if isinstance(value, dict) else type(value)
