# SPDX-License-Identifier: Apache-2.0
"""What is known of real sets is found in them; each number is counted a second time, from the raw file."""

import collections
import csv
import json
import pathlib
import re
from typing import Any

import pytest

from jft.data import checks, findings, formats


@pytest.fixture(scope="session")
def data(shared: pathlib.Path) -> pathlib.Path:
    return shared / "data"


def check(
    train: pathlib.Path, valid: pathlib.Path | None = None, **columns: str
) -> dict[tuple[str, str], findings.Finding]:
    """Findings by kind and severity."""
    reading = formats.Reading(columns=columns)
    examination = checks.Examination()
    for row in formats.Table(str(train), reading):
        examination.add(row)
    for row in formats.Table(str(valid), reading) if valid else ():
        examination.add(row, valid=True)
    told = examination.findings()
    assert len({(finding.kind, finding.severity) for finding in told}) == len(told)
    return {(finding.kind, finding.severity): finding for finding in told}


def kinds(found: dict[tuple[str, str], findings.Finding]) -> set[str]:
    return {kind for kind, severity in found if severity != "note"}


def numbers(finding: findings.Finding) -> list[int]:
    return [number for _, number in finding.places]


def load(path: pathlib.Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    return json.loads(text)


def repeated(values: list[Any]) -> list[int]:
    """Numbers, from 1, of the values that stand before."""
    seen: set[str] = set()
    found = []
    for number, value in enumerate(values, start=1):
        key = json.dumps(value, sort_keys=True)
        if key in seen:
            found.append(number)
        seen.add(key)
    return found


def answers_of(pairs: list[tuple[str, str]]) -> tuple[int, int, int]:
    """Prompts with several answers, their rows beyond the first, all their rows."""
    by_prompt = collections.defaultdict(list)
    for prompt, answer in pairs:
        by_prompt[prompt].append(answer)
    several = [said for said in by_prompt.values() if len(set(said)) > 1]
    rows = sum(map(len, several))
    return len(several), rows - len(several), rows


def test_dolly_has_one_prompt_with_two_answers(data: pathlib.Path) -> None:
    path = data / "dolly_hhrlhf_small" / "dolly_hhrlhf_train_small.jsonl"
    found = check(path)
    raw = load(path)
    assert len(raw) == 1000
    assert answers_of([(row["prompt"], row["response"]) for row in raw]) == (1, 1, 2)
    conflict = found["conflict", "warning"]
    assert (conflict.count, conflict.details["rows"]) == (1, 2)
    assert len({raw[number - 1]["prompt"] for number in numbers(conflict)}) == 1
    lost = [n for n, row in enumerate(raw, 1) if "\ufffd" in json.dumps(row, ensure_ascii=False)]
    assert numbers(found["encoding", "warning"]) == lost and len(lost) == 1
    # Near duplicates under one instruction are few: the Alpaca template is in every prompt.
    assert found["near_duplicate", "warning"].count == 3
    assert (
        found["template", "warning"].count == 1000
    )  # of which every prompt already holds Alpaca's
    assert kinds(found) == {"conflict", "encoding", "near_duplicate", "placeholder", "template"}


def test_wikisql_has_one_duplicate_and_no_leak(data: pathlib.Path) -> None:
    train = data / "wikisql_mlx" / "train.jsonl"
    assert repeated(load(train)) == [162]
    for other in ("valid", "test"):
        found = check(train, train.with_name(f"{other}.jsonl"))
        assert numbers(found["duplicate", "warning"]) == [162]
        assert ("leak", "warning") not in found and ("leak", "error") not in found
        assert kinds(found) == {"duplicate", "near_duplicate"}


def test_e2e_references_are_told_and_kept(data: pathlib.Path) -> None:
    path = data / "e2e_nlg" / "devset.csv"
    raw = [(row["mr"], row["ref"]) for row in load(path)]
    assert len(raw) == 4672
    assert answers_of(raw) == (547, 4125, 4672)
    conflict = check(path, prompt="mr", response="ref")["conflict", "warning"]
    assert (conflict.count, conflict.details["repeats"], conflict.details["rows"]) == (
        547,
        4125,
        4672,
    )
    assert "4,125" in conflict.message and "fix" not in conflict.details


def test_banking_leaks_25_prompts(data: pathlib.Path) -> None:
    train, test = data / "banking77" / "train.csv", data / "banking77" / "test.csv"
    found = check(train, test, prompt="text", response="category")

    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^a-z0-9]", " ", text.lower()).split())

    raw, exam = load(train), load(test)
    assert (len(raw), len(exam)) == (10_003, 3_080)
    known = {plain(row["text"]) for row in raw}
    leaked = [number for number, row in enumerate(exam, 1) if plain(row["text"]) in known]
    assert len(leaked) == 25
    leak = found["leak", "warning"]
    assert leak.count == 25
    assert [number for _, number in leak.details["valid_rows"]] == leaked
    asked = {plain(exam[number - 1]["text"]) for number in leaked}
    assert {plain(raw[number - 1]["text"]) for number in numbers(leak)} == asked

    balance = found["imbalance", "note"]
    counts = collections.Counter(row["category"] for row in raw)
    assert balance.count == len(counts) == 77
    assert balance.details["classes"] == dict(counts)
    # One-line questions about one bank: paraphrases, and not one large group.
    near = found["near_duplicate", "warning"]
    assert near.count < 150 and max(map(len, near.details["groups"])) <= 5
    assert kinds(found) == {"leak", "duplicate", "near_duplicate"}


@pytest.mark.slow  # 9,000 rows
def test_gsm8k_is_clean(data: pathlib.Path) -> None:
    train, test = data / "gsm8k" / "train.jsonl", data / "gsm8k" / "test.jsonl"
    raw, exam = load(train), load(test)
    assert (len(raw), len(exam)) == (7473, 1319)
    found = check(train, test)
    assert kinds(found) == set()
    space = [n for n, row in enumerate(raw, 1) if "\u200b" in json.dumps(row, ensure_ascii=False)]
    assert space == [
        number for path, number in found["encoding", "note"].places if path == str(train)
    ]


def test_dpo_pairs(data: pathlib.Path) -> None:
    path = data / "dpo_en_demo" / "dpo_en_demo.json"
    found, raw = check(path), load(path)
    assert len(raw) == 300
    assert numbers(found["duplicate", "warning"]) == repeated(raw)
    assert found["duplicate", "warning"].count == 5
    damaged = [n for n, row in enumerate(raw, 1) if "Ã" in json.dumps(row, ensure_ascii=False)]
    assert numbers(found["encoding", "warning"]) == damaged == [16]
    assert numbers(found["repetition", "note"]) == [
        n for n, row in enumerate(raw, 1) if "0" * 500 in row["rejected"]["value"]
    ]
    assert kinds(found) == {"duplicate", "encoding", "placeholder"}


def test_kto_labels(data: pathlib.Path) -> None:
    path = data / "kto_en_demo" / "kto_en_demo.json"
    found, raw = check(path), load(path)
    assert len(raw) == 300
    damaged = [n for n, row in enumerate(raw, 1) if "Ã" in json.dumps(row, ensure_ascii=False)]
    assert numbers(found["encoding", "warning"]) == damaged and len(damaged) == 2
    assert kinds(found) == {
        "encoding",
        "placeholder",
    }  # judged answers do not contradict each other


def test_glaive_has_one_degenerate_row(data: pathlib.Path) -> None:
    path = data / "glaive_toolcall_en" / "glaive_toolcall_en_demo.json"
    found, raw = check(path), load(path)
    zeros = [n for n, row in enumerate(raw, 1) if re.search("0{1000}", json.dumps(row))]
    assert zeros == [244]
    assert numbers(found["repetition", "warning"]) == [244]
    assert numbers(found["duplicate", "warning"]) == repeated(raw)
    assert "personal_data" not in kinds(found) and "secret" not in kinds(found)


def test_fastchat_contexts_have_several_answers(data: pathlib.Path) -> None:
    path = data / "fastchat_sharegpt" / "dummy_conversation.json"
    found, raw = check(path), load(path)
    assert len(raw) == 500
    turns = [[turn["value"] for turn in row["conversations"]] for row in raw]
    counted = answers_of([(json.dumps(said[:-1]), said[-1]) for said in turns])
    assert counted == (51, 116, 167)
    conflict = found["conflict", "warning"]
    assert (conflict.count, conflict.details["repeats"], conflict.details["rows"]) == counted
    assert kinds(found) == {"conflict", "near_duplicate", "placeholder"}


def test_persona_has_unfilled_names(data: pathlib.Path) -> None:
    path = data / "identity_persona" / "identity.json"
    found, raw = check(path), load(path)
    assert len(raw) == 91
    holes = [n for n, row in enumerate(raw, 1) if "{{" in row["output"]]
    placeholder = found["placeholder", "warning"]
    assert placeholder.details["patterns"]["{{name}}"] == len(holes) == 85
    assert set(holes) <= set(numbers(placeholder))
    assert found["language", "note"].details["languages"].keys() == {"en", "zh"}


def test_alpaca_has_14_duplicates(data: pathlib.Path) -> None:
    path = data / "alpaca_en_demo" / "alpaca_en_demo.json"
    found, raw = check(path), load(path)
    assert (len(raw), sum(bool(row["input"]) for row in raw)) == (999, 412)
    assert numbers(found["duplicate", "warning"]) == repeated(raw)
    assert found["duplicate", "warning"].count == 14
    assert kinds(found) == {"duplicate", "placeholder"}


def test_wikitext_holds_unknown_tokens(data: pathlib.Path) -> None:
    for name in ("valid.txt", "test.txt"):
        found = check(data / "wikitext2" / name)
        assert found["placeholder", "note"].details["patterns"] == {"<unk>": 1}
        assert kinds(found) == set()


def test_shakespeare_is_clean(data: pathlib.Path) -> None:
    assert check(data / "tinyshakespeare" / "input.txt") == {}


CHOICES = ("arc_easy", "copa", "piqa", "winogrande", "winograd_wsc")


@pytest.mark.parametrize("name", [*CHOICES, pytest.param("lambada_openai", marks=pytest.mark.slow)])
def test_evaluation_sets(data: pathlib.Path, name: str) -> None:
    path = data / "evals_small" / f"{name}.jsonl"
    columns = {} if name in CHOICES else {"prompt": "context", "response": "continuation"}
    found, raw = check(path, **columns), load(path)
    assert kinds(found) <= {"duplicate", "near_duplicate", "conflict"}
    if name == "lambada_openai":
        assert numbers(found["duplicate", "warning"]) == repeated(raw)
    elif ("duplicate", "warning") in found:
        assert len(raw) > found["duplicate", "warning"].count


@pytest.mark.parametrize("name", ["alpaca", "chat", "hh_rlhf"])
def test_tiny_fixtures_are_clean(data: pathlib.Path, name: str) -> None:
    assert kinds(check(data / "torchtune_tiny" / f"{name}_tiny.json")) == set()
