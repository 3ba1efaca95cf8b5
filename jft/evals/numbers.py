# SPDX-License-Identifier: Apache-2.0
"""The number that an answer comes to: its last one, read exactly.

Read are 1,234.5, 1.000.000 and 1 234 (with a fixed space), -3, $12, 5e3, 3/4, 1 1/2, ½, 50 %, and LaTeX's \\frac{3}{4} and 50\\%. Units are
not converted: "3 km" is 3. A comma is read only between thousands: "3,5" is 3 and then 5. What stands behind "####" is the
answer where that occurs, as in GSM8K.
"""

import dataclasses
import fractions
import re
import unicodedata
from collections.abc import Callable

from jft import errors
from jft.evals import matching, result

_WHOLE = r"(?:\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)"
_POINTS = r"\d{1,3}(?:\.\d{3}){2,}(?![.\d])"  # 1.000.000 can only be a million
_PLAIN = rf"(?:{_POINTS}|{_WHOLE}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-\u2212])?[$€£¥]?
    (?:(?P<mixed>\d+)[ ]+(?=\d+/\d))?
    (?P<value>{_PLAIN})(?P<exponent>[eE][-+]?\d{{1,3}})?
    (?:\s?/\s?(?P<under>{_WHOLE})(?![/\d]))?
    (?P<percent>\s?(?:%|percent\b|per\ cent\b))?""",
    re.VERBOSE,
)
_LATEX = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")


@dataclasses.dataclass(frozen=True)
class Number:
    value: fractions.Fraction
    percent: bool


def last(text: str) -> Number | None:
    """The last number in a text; None without any, or where it has more digits than Python reads."""
    found = list(_NUMBER.finditer(_plain(text.rsplit("####", 1)[-1])))
    try:
        return _read(found[-1]) if found else None
    except ValueError:
        return None


def _plain(text: str) -> str:
    """LaTeX and the characters for fractions, written out."""
    text = text.replace(r"\%", "%").replace("{,}", ",").replace(r"\!", "").replace(r"\,", "")
    text = _LATEX.sub(r" \1/\2 ", text)
    return _VULGAR.sub(
        lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text
    )


def _read(found: re.Match[str]) -> Number:
    digits = re.sub(r"[^\d.]", "", found["value"])
    if digits.count(".") > 1:
        digits = digits.replace(".", "")
    value = fractions.Fraction(digits + (found["exponent"] or ""))
    under = int(re.sub(r"\D", "", found["under"] or "1"))
    # 3/0 is no number: what stands before the stroke is taken.
    value = value / under if under else value
    value += int(found["mixed"] or 0)
    return Number(-value if found["sign"] else value, bool(found["percent"]))


def equal(got: Number, wanted: Number, tolerance: float = 0.0) -> bool:
    """Equal within `tolerance` times the wanted one. Where only one is a percentage, 50 % equals 0.5 and 50."""
    pairs = [(got.value, wanted.value)]
    if got.percent and not wanted.percent:
        pairs.append((got.value / 100, wanted.value))
    if wanted.percent and not got.percent:
        pairs.append((got.value, wanted.value / 100))
    room = fractions.Fraction(tolerance)
    return any(abs(a - b) <= room * abs(b) for a, b in pairs)


def score(argument: str) -> Callable[[matching.Answers], result.Result]:
    """`number` or `number:TOLERANCE`, relative.

    Raises:
      UserError: the tolerance is no number; when measured: a reference holds no number.
    """
    try:
        tolerance = float(argument or 0)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise errors.UserError(f"score number:{argument}: a tolerance such as number:0.01 (1 %)")

    def right(a: result.Answer) -> bool:
        wanted, got = last(a.reference), last(a.text)
        if wanted is None:
            raise errors.UserError(
                f"score number: a reference holds no number: {a.reference[:80]!r}; use exact_match"
            )
        return got is not None and equal(got, wanted, tolerance)

    return lambda answers: result.mean("number", [right(a) for a in answers])
