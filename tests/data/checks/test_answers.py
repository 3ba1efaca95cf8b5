# SPDX-License-Identifier: Apache-2.0
"""Balance of classes and labels, and the mix of languages."""

import random

import pytest

from jft.data import checks, examples, findings
from jft.data.checks import answers, found, languages


def balance(said: list[str], **fields: object) -> list[findings.Finding]:
    places, check = found.Places(), answers.Answers()
    for number, answer in enumerate(said, start=1):
        row = places.add("a.jsonl", number, valid=False)
        check.add(row, examples.Example(examples.pair(f"q{number}", answer), "", **fields))
    return check.told(places)


def test_even_classes_are_a_note_that_counts_them() -> None:
    (finding,) = balance(["yes", "no ", " maybe"] * 20)
    assert (finding.kind, finding.severity, finding.count) == ("imbalance", "note", 3)
    assert finding.details["classes"] == {"yes": 20, "no": 20, "maybe": 20}
    assert finding.places == ()


def test_one_class_of_most_rows_is_a_warning() -> None:
    (finding,) = balance(["yes"] * 61 + ["no"] * 39)
    assert finding.severity == "warning"
    assert "'yes' has 61.0% of the rows" in finding.message
    (finding,) = balance(["yes"] * 60 + ["no"] * 40)
    assert finding.severity == "note"


def test_many_tiny_classes_are_a_warning_that_lists_their_rows() -> None:
    said = ["a"] * 30 + ["b"] * 30 + ["c"] * 9 + ["d"] * 2
    (finding,) = balance(said)
    assert (finding.severity, finding.details["tiny"], finding.details["smallest"]) == (
        "warning",
        2,
        2,
    )
    assert [number for _, number in finding.places] == list(range(61, 72))


@pytest.mark.parametrize(
    "said",
    [
        [f"answer {n}" for n in range(100)],  # as many answers as rows
        ["yes", "no"] * 10,  # too few rows
        ["yes"] * 50 + ["a long answer that says much more than a class could, in many words"] * 5,
        ["yes"] * 100,  # one class
    ],
)
def test_open_answers_are_no_classes(said: list[str]) -> None:
    assert balance(said) == []


def test_many_different_answers_stay_no_classes() -> None:
    check, places = answers.Answers(), found.Places()
    for number in range(15_000):
        row = places.add("a", number, valid=False)
        said = examples.pair("q", str(number % 2500))
        check.add(row, examples.Example(said, ""))
    assert check.told(places) == []


def test_labels_of_unpaired_preferences() -> None:
    def labelled(good: int, bad: int) -> list[findings.Finding]:
        places, check = found.Places(), answers.Answers()
        for number, label in enumerate([True] * good + [False] * bad):
            row = places.add("a", number, valid=False)
            check.add(row, examples.Example(examples.pair("q", "yes"), "", label=label))
        return check.told(places)

    assert labelled(60, 40) == []
    (finding,) = labelled(10, 90)
    assert (finding.severity, finding.count, finding.details) == (
        "warning",
        90,
        {"labels": {"false": 90, "true": 10}},
    )


# --- languages

TEXTS = {
    "en": "The committee met on a cold morning to talk about the new bridge across the river.",
    "de": "Der Ausschuss traf sich an einem kalten Morgen, um über die neue Brücke zu sprechen.",
    "fr": "Le comité s'est réuni par un matin froid pour parler du nouveau pont sur la rivière.",
    "zh": "委员会在一个寒冷的早晨开会，讨论横跨河流的新桥，以及如何支付建设费用的问题。",
}


def examined(names: list[str], seed: int = 0) -> tuple[list[findings.Finding], list[int]]:
    order = list(range(len(names)))
    random.Random(seed).shuffle(order)
    examination = checks.Examination(near=False)
    for number in order:
        said = examples.pair(f"question {number}", f"{TEXTS[names[number]]} {number}")
        examination.add(examples.Example(said, "", "a.jsonl", number))
    told = [finding for finding in examination.findings() if finding.kind == "language"]
    return told, sorted(number for finding in told for _, number in finding.places)


def test_one_language_is_no_finding() -> None:
    assert examined(["en"] * 50)[0] == []


def test_rare_languages_are_listed() -> None:
    (finding,), rows = examined(["en"] * 60 + ["fr"] + ["de"] * 2)
    assert (finding.severity, finding.count, rows) == ("note", 3, [60, 61, 62])
    assert finding.details == {"languages": {"en": 60, "de": 2, "fr": 1}, "sampled": False}


def test_several_large_languages_are_told() -> None:
    (finding,), rows = examined(["en"] * 30 + ["zh"] * 20)
    assert (finding.count, rows) == (20, list(range(30, 50)))
    assert "en 30, zh 20" in finding.message


def test_the_sample_does_not_depend_on_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "SAMPLE", 40)
    names = (["en"] * 3 + ["de"]) * 50
    (first,), rows = examined(names)
    (second,), again = examined(names, seed=1)
    assert (first.details, rows) == (second.details, again)
    assert first.details["sampled"] and "a sample of" in first.message
    assert 15 <= sum(first.details["languages"].values()) <= 40
    assert all(names[row] == "de" for row in rows)
