# SPDX-License-Identifier: Apache-2.0
"""The whole examination: unusable rows, the order of findings, bounded memory, and no rows at all."""

import pathlib
import random
import tracemalloc

import pytest

from jft.data import checks, examples, findings


def example(number: int, prompt: str, answer: str) -> examples.Example:
    return examples.Example(examples.pair(prompt, answer), "", "a.jsonl", number)


def fault(number: int, kind: str) -> examples.Fault:
    return examples.Fault(kind, f"a.jsonl:row {number}: is {kind}; mend it", "a.jsonl", number)


def test_nothing_is_found_in_nothing() -> None:
    assert checks.Examination().findings() == []
    examination = checks.Examination()
    examination.add(fault(1, "malformed"))
    assert [finding.kind for finding in examination.findings()] == ["malformed"]


def test_faults_become_errors_with_their_rows() -> None:
    examination = checks.Examination(languages=False)
    for number in range(1, 31):
        kind = {0: "malformed", 1: "empty"}.get(number % 10)
        examination.add(
            fault(number, kind) if kind else example(number, f"q{number}", f"a{number}")
        )
    malformed, empty = examination.findings()
    assert (malformed.kind, malformed.severity, malformed.count) == ("malformed", "error", 3)
    assert malformed.places == (("a.jsonl", 10), ("a.jsonl", 20), ("a.jsonl", 30))
    assert "a.jsonl:row 10: is malformed; mend it (and 2 more)" in malformed.message
    assert malformed.details["messages"][2] == "a.jsonl:row 30: is malformed; mend it"
    assert (empty.kind, empty.places[0]) == ("empty", ("a.jsonl", 1))


def test_errors_come_first_then_the_order_of_kinds() -> None:
    examination = checks.Examination()
    key = "AK" + "IA" + "Q3EGRWTZ7PLMVK2D"
    said = [
        ("a", "x"),
        ("a", "y"),
        ("a", "y"),
        ("b", "I am {{name}}."),
        ("c", "lost \ufffd"),
        ("d", key),
    ]
    said += [("e", "ha! " * 200), ("f", "call 212-664-7665"), ("g", "a\u200bb")]
    for number, (prompt, answer) in enumerate(said, start=2):
        examination.add(example(number, prompt, answer))
    examination.add(fault(1, "empty"))
    told = examination.findings()
    assert [finding.kind for finding in told] == [
        "empty",
        "conflict",
        "duplicate",
        "placeholder",
        "encoding",
        "encoding",
        "repetition",
        "secret",
        "personal_data",
    ]
    assert [finding.severity for finding in told[4:6]] == ["warning", "note"]
    assert told[0].severity == "error"
    for finding in told:
        assert finding.kind in findings.KINDS and finding.severity in findings.SEVERITIES
        assert finding.count > 0 and "\n" not in finding.message + finding.advice
        assert list(finding.places) == sorted(finding.places)


def test_findings_can_be_asked_for_again() -> None:
    examination = checks.Examination(languages=False)
    for number, answer in enumerate(["x", "x"], start=1):
        examination.add(example(number, "a", answer))
    first = examination.findings()
    assert examination.findings() == first
    examination.add(example(3, "a", "x"))
    assert examination.findings()[0].count == 2


@pytest.mark.parametrize("near", [True, False])
def test_near_duplicates_can_be_left_out(near: bool) -> None:
    examination = checks.Examination(near=near)
    text = " ".join(f"word{n}" for n in range(40))
    examination.add(example(1, "a", text))
    examination.add(example(2, "a", text + " end"))
    kinds = {finding.kind for finding in examination.findings()}
    assert ("near_duplicate" in kinds) == near


def test_the_order_of_rows_changes_no_count() -> None:
    rng = random.Random(0)
    rows = [example(n, f"q{n % 70}", f"{n % 30} " + "word " * (n % 3)) for n in range(100)]
    counts = []
    for _ in range(3):
        examination = checks.Examination(languages=False)
        for row in rows:
            examination.add(row)
        counts.append([(f.kind, f.count, sorted(f.details)) for f in examination.findings()])
        rng.shuffle(rows)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("length", [15, 45])
def test_memory_holds_no_texts(length: int) -> None:
    """Long rows cost no more than short ones: 83 bytes in arrays, which have room to grow."""
    examination = checks.Examination(languages=False)

    def add(rows: int) -> None:  # signatures are made of 1,024 rows at once
        for number in range(rows):
            answer = " ".join(f"{number * place % 9973}" for place in range(1, length))
            examination.add(example(number, f"question {number}", answer))

    add(1024)
    tracemalloc.start()
    add(1024)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held / 1024 < 200


def test_the_temporary_file_goes_with_the_examination(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    examination = checks.Examination()
    for number in range(1200):
        examination.add(example(number, f"q{number}", "x"))
    examination.findings()
    assert list(tmp_path.iterdir()) == []  # it has no name: nothing is left, whatever happens
