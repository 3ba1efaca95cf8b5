# SPDX-License-Identifier: Apache-2.0
"""Damaged encodings and loops are found; other languages, code, tables and poems are left in peace."""

import random

import pytest

from jft.data import findings
from jft.data.checks import damage, found, parts

PROSE = (
    "The lobsters are blue, only becoming red on cooking. Mating occurs in the summer, producing eggs which are "
    "carried by the females for up to a year before hatching into larvae. It may grow to a length of sixty "
    "centimetres and a mass of six kilograms, and bears a conspicuous pair of claws. "
)


def told(text: str, part: str = parts.ANSWER) -> list[findings.Finding]:
    places = found.Places()
    row = places.add("a.jsonl", 1, valid=False)
    check = damage.Damage()
    check.add(row, text, part)
    return check.told(places)


def patterns(text: str, part: str = parts.ANSWER) -> set[str]:
    return {name for finding in told(text, part) for name in finding.details["patterns"]}


GOOD = [
    "her fiancé Cal",
    "Belle Époque, Chéri",
    "naïve — “quoted” … £20",
    "Привет, мир",
    "今日は",
    "Ærø",
]


@pytest.mark.parametrize("text", GOOD)
def test_mojibake_is_found_and_repaired(text: str) -> None:
    for encoding in ("latin-1", "cp1252"):
        damaged = text.encode().decode(encoding, "replace")
        if "\ufffd" in damaged:
            continue
        assert patterns(damaged) >= {"mojibake"} or damaged == text
        assert damage.repair(damaged) == text
    assert damage.repair(text) == text
    assert patterns(text) == set()


def test_lost_and_control_characters_are_found() -> None:
    assert patterns("a lost \ufffd letter") == {"U+FFFD"}
    for character in ("\0", "\x08", "\x1b", "\x7f", "\x9d"):
        assert patterns(f"a {character} b") == {"control character"}
    assert patterns("tab\t, line\r\n, feed\x0c, next line\x85, no-break\xa0") == set()


def test_characters_that_cannot_be_seen_are_a_note() -> None:
    for character in ("\u200b", "\ufeff", "\u202e", "\u2066"):
        (finding,) = told(f"a{character}b")
        assert (finding.kind, finding.severity) == ("encoding", "note")
    assert told("👩‍👩‍👧 می‌خواهم") == []  # joiners that languages and emoji need


LOOPS = {
    "zeros": "The result is 1326134." + "0" * 900,
    "phrase": "Ooh ooh ah ah! *giggle* " * 40,
    "after prose": PROSE + "and so on " * 60,
    "sentences": "".join(
        f"{n}. I like to read books.\n{PROSE[n * 7 : n * 7 + 9]}.\n" for n in range(30)
    ),
    "paragraph": PROSE[:240] * 8,
    "in a long text": "".join(chr(97 + random.Random(n).randrange(26)) for n in range(50_000))
    + "ab " * 1500,
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_found(name: str) -> None:
    (finding,) = told(LOOPS[name])
    assert (finding.kind, finding.severity, finding.details["fix"]) == (
        "repetition",
        "warning",
        "remove",
    )


TABLE = "| name | age | city |\n|---|---|---|\n" + "".join(
    f"| {name} | {age} | {city} |\n"
    for name, age, city in zip(
        "Anna Boris Clara David Eva Frank Gerda Hans".split(),
        range(31, 39),
        "Berlin Paris Rome Madrid Oslo Prague Vienna Bern".split(),
        strict=True,
    )
)
CODE = "def test(self):\n" + "".join(
    f"        self.assertEqual(self.client.get('/{name}').status_code, {code})\n"
    for name, code in zip(
        "users orders items carts pages".split(), (200, 404, 302, 403, 201), strict=True
    )
)
POEM = "\n".join(
    f"{line}\nAnd the rain, it raineth every day,\nWith hey, ho, the wind and the rain."
    for line in (
        "When that I was a tiny boy",
        "But when I came to man's estate",
        "But when I came to wive",
    )
)
NUMBERS = "\n".join(f"{n},{n * n},{n**3}" for n in range(100, 160))


@pytest.mark.parametrize(
    "text", [PROSE * 1, TABLE, CODE, POEM, NUMBERS, "ha " * 50, "-" * 120, "=" * 80 + PROSE]
)
def test_tables_code_and_poems_are_not_loops(text: str) -> None:
    assert told(text) == []


def test_a_loop_in_a_rejected_answer_is_a_note() -> None:
    (finding,) = told(LOOPS["zeros"], parts.REJECTED)
    assert (finding.severity, "fix" in finding.details) == ("note", False)
    assert told(LOOPS["zeros"], parts.CONTEXT)[0].severity == "warning"
