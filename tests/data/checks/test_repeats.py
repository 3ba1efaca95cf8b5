# SPDX-License-Identifier: Apache-2.0
"""Rows against each other: duplicates, near duplicates, conflicts and leaks, each with its clean twin."""

import random

import pytest

from jft.data import checks, examples, findings, near, split

Rows = list[examples.Example]
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "il")]


def sentence(length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def rows(*said: tuple[str, ...], path: str = "train.jsonl", **fields: object) -> Rows:
    """Conversations of user and assistant in turn, numbered from 1."""
    made = []
    for number, texts in enumerate(said, start=1):
        roles = ("user", "assistant") * len(texts)
        turns = tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))
        made.append(examples.Example(turns, f"{path}:row {number}", path, number, **fields))
    return made


def check(train: Rows, valid: Rows = []) -> dict[str, findings.Finding]:  # noqa: B006
    examination = checks.Examination(languages=False)
    for row in train:
        examination.add(row)
    for row in valid:
        examination.add(row, valid=True)
    told = examination.findings()
    assert len({finding.kind for finding in told}) == len(told)
    return {finding.kind: finding for finding in told}


def numbers(finding: findings.Finding) -> list[int]:
    return [number for _, number in finding.places]


CLEAN = rows(*((f"question {i}", sentence(30, i)) for i in range(40)))


def test_clean_rows_stay_clean() -> None:
    valid = rows(*((f"exam {i}", sentence(30, 100 + i)) for i in range(10)), path="valid.jsonl")
    assert check(CLEAN, valid) == {}


def test_duplicates_are_the_rows_beyond_the_first() -> None:
    found = check(rows(("p", "r"), ("p", " r\n"), ("q", "r"), ("p", "r"), ("P", "r")))
    assert numbers(found["near_duplicate"]) == [5]  # "P" is another text than "p"
    assert (found["duplicate"].count, numbers(found["duplicate"])) == (2, [2, 4])
    assert found["duplicate"].details["fix"] == "remove"


def test_what_makes_a_row_another_row() -> None:
    turns = rows(("p", "r"))[0].messages
    tool = ({"name": "f"},)
    worse = ({"role": "assistant", "content": "x"},)
    different = [
        examples.Example(turns, "", "a", 1),
        examples.Example(turns, "", "a", 2, tools=tool),
        examples.Example(({"role": "system", "content": "s"}, *turns), "", "a", 3),
        examples.Example(turns, "", "a", 4, rejected=worse),
    ]
    assert "duplicate" not in check(different)
    assert numbers(check([*different, *different])["duplicate"]) == [1, 2, 3, 4]


def test_near_duplicates_are_told_apart_from_duplicates() -> None:
    text = sentence(40, 1)
    said = [("p", text), ("q", sentence(40, 2)), ("p", text + " end"), ("p", text), ("q", "other")]
    found = check(rows(*said))
    assert numbers(found["near_duplicate"]) == [3]
    assert numbers(found["duplicate"]) == [4]
    groups = found["near_duplicate"].details["groups"]
    assert groups == [[["train.jsonl", 1], ["train.jsonl", 3]]]


def test_conflicts_count_prompts_and_repeats() -> None:
    said = [
        ("A b", "1"),
        ("a  B", "2"),
        ("a b", "1"),
        ("c", "3"),
        ("c", "3"),
        ("d", "1"),
        ("d", "2"),
    ]
    found = check(rows(*said))["conflict"]
    assert (found.count, numbers(found)) == (2, [1, 2, 3, 6, 7])
    assert found.details == {"prompts": 2, "repeats": 3, "rows": 5}
    assert "2 prompts" in found.message and "5 rows, 3 of them" in found.message
    assert "fix" not in found.details  # several answers may all be right


def test_the_whole_conversation_before_an_answer_is_its_prompt() -> None:
    assert "conflict" not in check(rows(("a", "b", "c", "1"), ("x", "b", "c", "2")))
    assert check(rows(("a", "b", "c", "1"), ("a", "b", "c", "2")))["conflict"].count == 1


def test_other_tools_are_another_prompt() -> None:
    first, second = rows(("a", "1"), ("a", "2"))
    tooled = examples.Example(second.messages, "", "train.jsonl", 2, tools=({"name": "f"},))
    assert "conflict" in check([first, second])
    assert "conflict" not in check([first, tooled])


def labelled(*said: tuple[str, str, bool]) -> Rows:
    return [
        examples.Example(examples.pair(prompt, answer), "", "train.jsonl", number, label=label)
        for number, (prompt, answer, label) in enumerate(said, start=1)
    ]


def test_an_answer_both_good_and_bad_is_a_conflict() -> None:
    good_and_bad = check(labelled(("a", "1", True), ("b", "1", False), ("A", "1", False)))
    assert numbers(good_and_bad["conflict"]) == [1, 3]
    # Two judged answers of one prompt are what such sets are made of.
    assert "conflict" not in check(labelled(("a", "1", True), ("a", "2", False)))


def test_pairs_that_contradict_each_other_are_a_conflict() -> None:
    def pair(number: int, chosen: str, rejected: str) -> examples.Example:
        worse = ({"role": "assistant", "content": rejected},)
        return examples.Example(examples.pair("a", chosen), "", "t", number, rejected=worse)

    found = check([pair(1, "x", "y"), pair(2, "z", "w"), pair(3, "y", "x")])["conflict"]
    assert (found.count, numbers(found)) == (2, [1, 3])
    assert "conflict" not in check([pair(1, "x", "y"), pair(2, "x", "z")])


@pytest.mark.parametrize(("leaked", "severity"), [(1, "warning"), (5, "error")])
def test_leaks_name_the_training_rows(leaked: int, severity: str) -> None:
    """Once case, spacing and punctuation are gone; at a twentieth of the validation rows it is an error."""
    valid = [(f"Question -- {i}?", "other") for i in range(leaked)]
    valid += [(f"exam {i}", sentence(30, 100 + i)) for i in range(50 - leaked)]
    found = check(CLEAN, rows(*valid, path="valid.jsonl"))["leak"]
    assert (found.count, found.severity) == (leaked, severity)
    assert found.places == tuple(("train.jsonl", i + 1) for i in range(leaked))
    assert found.details["valid_rows"] == [["valid.jsonl", i + 1] for i in range(leaked)]


def test_an_operator_is_no_punctuation() -> None:
    valid = rows(("What is 3 - 4?", "-1"), path="valid.jsonl")
    assert "leak" not in check(rows(("What is 3 + 4?", "7")), valid)
    assert "leak" in check(rows(("what is: 3 - 4", "7")), valid)


def test_near_leaks_are_counted_beside() -> None:
    text = sentence(40, 1)
    valid = rows((text + " end", "r"), (f"{sentence(40, 7)}", "s"), path="valid.jsonl")
    train = rows((text, "r"), (sentence(40, 3), "t"))
    found = check(train, valid)["leak"]
    assert (found.severity, found.count, found.places) == ("note", 1, ())
    assert found.details["near_valid_rows"] == [["valid.jsonl", 1]]
    both = check([*train, *rows((sentence(40, 7), "u"), path="more.jsonl")], valid)["leak"]
    assert (both.count, both.places) == (1, (("more.jsonl", 1),))
    assert "1 more nearly equal" in both.message


def test_training_and_validation_are_compared_within_themselves() -> None:
    valid = rows(("p", "r"), ("q", "s"), ("q", "t"), path="valid.jsonl")
    found = check(rows(("p", "r"), ("u", "v")), valid)
    assert set(found) == {"conflict", "leak"}
    assert found["conflict"].places == (("valid.jsonl", 2), ("valid.jsonl", 3))


def test_plain_texts_have_no_answers_but_repeat() -> None:
    texts = [
        examples.Example((), "", "a.txt", n, text=t) for n, t in enumerate(("x", "y", "x "), 1)
    ]
    found = check(texts)
    assert set(found) == {"duplicate"}
    assert numbers(found["duplicate"]) == [3]


def test_what_the_split_holds_out_does_not_leak() -> None:
    """Prompts that differ in punctuation, and near duplicates, fall on one side, and the check agrees."""
    said = [(f"Question: {i % 60}{'?' * (i // 60)}", sentence(8, i)) for i in range(120)]
    said += [(f"ask {i}", f"{sentence(40, i // 2)} {i}") for i in range(200, 260)]
    made = rows(*said)
    signatures = near.Signatures()
    for row in made:
        signatures.add(near.text(row))
    keys = [split.prompt_key(row, 0) for row in made]
    held = split.held_out(keys, signatures.groups(), 0.3, 0)
    assert 40 < held.sum() < 60
    sides = [
        [row for row, out in zip(made, held, strict=True) if out == side] for side in (False, True)
    ]
    assert "leak" not in check(*sides)
    by_row = [[row for row in made if row.number % 3 == side] for side in (0, 1)]
    assert check(*by_row)["leak"].count > 0
