# SPDX-License-Identifier: Apache-2.0
"""A run's data: what it is refused for, what is told of it, and sources together."""

import json
import pathlib
from typing import Any

import pytest

from jft import errors, models
from jft.data import batches, load, tokenised


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def tokenizer(tiny_model: pathlib.Path) -> Any:
    return models.load_tokenizer(str(tiny_model))


def write(path: pathlib.Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(word: str, count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{word} number {i}?", "response": f"{word} " * (i % 5 + 1)}
        for i in range(count)
    ]


def loaded(tokenizer: Any, train: str, **settings: Any) -> load.Data:
    source = load.Source(train, **{"max_length": 64, "valid_fraction": 0.0} | settings)
    return load.load(source, tokenizer, seed=0, vocab_size=10**6)


def test_a_leak_stops_a_run_unless_it_is_allowed(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    train = write(tmp_path / "train.jsonl", *pairs("red", 20))
    valid = write(tmp_path / "valid.jsonl", *pairs("red", 1), *pairs("blue", 9))
    with pytest.raises(
        errors.UserError, match="data: leak: 1 of 10 validation rows.*or set data.allow=leak"
    ):
        loaded(tokenizer, train, valid=valid)
    found = loaded(tokenizer, train, valid=valid, allow="leak")
    assert [f["kind"] for f in found.report["findings"] if f["severity"] == "error"] == ["leak"]
    assert any(line.startswith("error: leak: 1 of 10") for line in load.lines(found.report))
    with pytest.raises(errors.UserError, match="data.allow=leek: 'leek' is no kind of finding"):
        loaded(tokenizer, train, valid=valid, allow="leek")


def test_what_is_told_of_the_data(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    rows = [
        {"question": "red?", "answer": "blue", "id": 7},
        *({"question": f"green {i}", "answer": "one " * 60 * i} for i in (1, 2)),
    ]
    train = write(tmp_path / "a.jsonl", *rows)
    told = load.lines(loaded(tokenizer, train, overlength="drop").report)
    assert (
        told[0]
        == f"{train}: prompt/response: prompt = 'question', response = 'answer' (not read: id)"
    )
    assert told[1].startswith("1 rows to train on (") and told[1].endswith("; 2 too long")


def test_sources_by_weight(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    names = [
        write(tmp_path / f"{word}.jsonl", *pairs(word, count))
        for word, count in (("red", 30), ("blue", 90))
    ]
    found = loaded(tokenizer, ", ".join(names), weights="2,0.5", valid_fraction=0.1)
    assert [len(part) for part in found.train] == [
        found.report["train"]["kept"] - len(found.train[1]),
        len(found.train[1]),
    ]
    assert sum(map(len, found.train)) + len(found.valid) == 120
    weights = load.Source("a,b", weights="2,0.5").times
    made = batches.Batches(found.train, batch_size=2, length=64, seed=0, weights=weights)
    shares = made.shares()
    assert shares[0].rows == 2 * len(found.train[0])
    assert shares[1].rows == pytest.approx(0.5 * len(found.train[1]), rel=0.1)  # whole packed rows
    with pytest.raises(errors.UserError, match="data.weights=2,x: numbers wanted"):
        _ = load.Source("a,b", weights="2,x").times
    with pytest.raises(errors.UserError, match="data.train is not set"):
        _ = load.Source(" , ").trains


def test_preferences_are_for_other_trainings(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "red?", "chosen": "blue", "rejected": "green"},
        {"prompt": "one?", "chosen": "two", "rejected": "three"},
    ]
    path = write(tmp_path / "pairs.jsonl", *rows)
    with pytest.raises(errors.UserError, match="preference: .*data.columns.response=chosen"):
        loaded(tokenizer, path)
    columns = {"prompt": "prompt", "response": "chosen"}
    found = loaded(tokenizer, path, columns=columns)
    assert [
        e.messages[-1]["content"]
        for e in loaded(tokenizer, path, columns=columns, test=path, allow="leak").test
    ] == ["blue", "two"]
    assert found.report["sources"][0]["unused_columns"] == ["rejected"]
    labels = write(
        tmp_path / "labels.jsonl",
        *({**pair, "label": i % 2 == 0} for i, pair in enumerate(pairs("red", 4))),
    )
    with pytest.raises(errors.UserError, match="labelled bad"):
        loaded(tokenizer, labels)


def test_plain_text_is_trained_whole_and_split(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the user asks the assistant for red green blue\n" * 40)
    with pytest.raises(errors.UserError, match="longer than data.max_length=64.*split"):
        loaded(tokenizer, str(path))
    (rows,) = loaded(tokenizer, str(path), overlength="split").train
    pieces = [rows[i] for i in range(len(rows))]
    ids = [pieces[0].tokens[0], *(t for piece in pieces for t in piece.tokens[1:])]
    assert tokenizer.decode(ids) == path.read_text() + "<eos>"
    assert all(piece.trained[1:].all() for piece in pieces)


def test_a_template_by_name(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    load.use_template(tokenizer, "plain")
    (rows,) = loaded(
        tokenizer, write(tmp_path / "a.jsonl", {"prompt": "red green ", "response": "blue"})
    ).train
    row = rows[0]
    assert tokenizer.decode(row.tokens) == "<bos>red green blue<eos>"
    assert tokenizer.decode(row.tokens[row.trained]) == "blue<eos>"
    with pytest.raises(errors.UserError, match="data.chat_template=.*: No such file"):
        load.use_template(tokenizer, str(tmp_path / "none.jinja"))
