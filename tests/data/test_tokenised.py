# SPDX-License-Identifier: Apache-2.0
"""Rows in the cache are those that were encoded, under a key that changes with all that they depend on."""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from jft import errors, models
from jft.data import encoding, examples, formats, load, rows, store, tokenised


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(tokenised, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tiny_model: pathlib.Path) -> Any:
    return models.load_tokenizer(str(tiny_model))


def write(path: pathlib.Path, count: int, word: str = "hello") -> str:
    made = [{"prompt": f"the user {i}", "response": f"{word} " * (i % 7 + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def tokenise(source: str, tokenizer: Any, **settings: str) -> store.Stored:
    encoder = encoding.Encoder(tokenizer, **settings)
    return tokenised.tokenised(source, formats.Reading(), encoder, settings)


def equal(one: rows.Row, other: rows.Row) -> bool:
    same = np.array_equal(one.tokens, other.tokens) and np.array_equal(one.trained, other.trained)
    return same and one.source == other.source and one.tokens.dtype == other.tokens.dtype


def test_rows_and_examples_are_as_encoded(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", 2 * store.BATCH + 5)
    stored = tokenise(path, tokenizer)
    encoder = encoding.Encoder(tokenizer)
    expected = formats.read(path)
    assert list(stored.read_examples()) == expected
    assert [stored.example(i) for i in (0, store.BATCH, 2 * store.BATCH + 4)] == [
        expected[i] for i in (0, store.BATCH, 2 * store.BATCH + 4)
    ]
    assert len(stored) == len(expected)
    for i, example in enumerate(expected):
        (row,) = encoder.one(example)
        assert equal(stored[i], row)
        assert stored.lengths[i] == len(row.tokens) - 1
        assert stored.trained[i] == row.trained[1:].sum()


def test_examples_of_every_shape_come_back(tmp_path: pathlib.Path) -> None:
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"a": 0, "b": False, "c": None}},
    }
    turns = examples.pair("é\u2028", "\U0001f600")
    made = [
        examples.Example(turns, "f:row 3", "f", 3, tools=({"name": "f"},)),
        examples.Example(
            (*turns, {"role": "assistant", "content": "", "tool_calls": [call]}), "f:row 4", "f", 4
        ),
        examples.Example((), "g:row 1", "g", 1, text="plain"),
        examples.Example(turns, "g:row 2", "g", 2, rejected=turns[1:], shared=1),
        *(examples.Example(turns, f"g:row {n}", "g", n, label=bool(n)) for n in (0, 1)),
        examples.Example(({"role": "assistant", "content": "x", "weight": 0},), "g:row 5", "g", 5),
    ]
    with store.Writer(tmp_path / "s", ["f", "g"]) as writer:
        writer.add(made, [[] for _ in made])
        writer.finish({})
    assert list(store.Stored(tmp_path / "s", ["f", "g"]).read_examples()) == made


def test_what_was_made_once_is_not_made_again(
    tmp_path: pathlib.Path, tokenizer: Any, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", 9)
    tokenise(path, tokenizer)

    def fail(*_: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoding.Encoder, "encode", fail)
    again = tokenise(path, tokenizer)
    assert again[3].source == f"{path}:row 4"
    # Equal contents elsewhere give the same rows, called by their own names.
    moved = str(shutil.copy(path, tmp_path / "b.jsonl"))
    assert tokenise(moved, tokenizer)[3].source == f"{moved}:row 4"
    with pytest.raises(AssertionError, match="encoded again"):
        tokenise(path, tokenizer, train_on="last")
    with pytest.raises(AssertionError, match="encoded again"):
        tokenise(path, tokenizer, system="be brief")
    tokenizer.chat_template += " "
    with pytest.raises(AssertionError, match="encoded again"):
        tokenise(path, tokenizer)


def test_what_is_not_used_for_long_goes(
    tmp_path: pathlib.Path, tokenizer: Any, cache: pathlib.Path
) -> None:
    path, other = write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 4)

    def kept() -> list[pathlib.Path]:
        return [entry for entry in cache.iterdir() if entry.name != "digests"]

    tokenise(path, tokenizer)
    (old,) = kept()
    os.utime(old, (1, 1))
    tokenise(other, tokenizer)
    assert len(kept()) == 1 and old not in kept()
    (used,) = kept()
    os.utime(used, (1, 1))
    tokenise(other, tokenizer)  # used again
    tokenise(path, tokenizer)
    assert used in kept() and len(kept()) == 2


def test_a_file_that_changed_is_read_again(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", 3, "hello")
    os.utime(path, (1, 1))  # long ago, so that its hash is remembered
    first = tokenise(path, tokenizer)
    write(tmp_path / "a.jsonl", 3, "green")  # of the same size
    os.utime(path, (2, 2))
    second = tokenise(path, tokenizer)
    assert not equal(first[0], second[0])
    write(tmp_path / "a.jsonl", 3, "three")  # changed just now: a hash would not be trusted
    assert not equal(second[0], tokenise(path, tokenizer)[0])


def test_nothing_is_kept_of_data_with_faults(
    tmp_path: pathlib.Path, tokenizer: Any, cache: pathlib.Path
) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 4)
    with path.open("a") as file:
        file.write('{"prompt": "p"}\n{"prompt": "p", "response": ""}\n')
    with pytest.raises(errors.UserError, match=r":row 5: .*first of 2 such rows of 6: `jft check`"):
        tokenise(str(path), tokenizer)
    assert [entry.name for entry in cache.glob("*") if entry.name != "digests"] == []


@pytest.mark.parametrize("sets", ["one", "two"])
def test_rows_in_are_rows_trained_and_rows_reported(
    tmp_path: pathlib.Path, tokenizer: Any, sets: str
) -> None:
    names = ["a.jsonl"] if sets == "one" else ["a.jsonl", "b.jsonl"]
    for at, name in enumerate(names):
        made = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} asks {i}"},
                    {"role": "assistant", "content": "red " * (i % 40 + 1), "weight": i % 5 and 1},
                ]
            }
            for i in range(120 + at)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    train = ",".join(str(tmp_path / name) for name in names)
    source = load.Source(train, max_length=60, overlength="drop", valid_fraction=0.2)
    found = load.load(source, tokenizer, seed=0, vocab_size=10**6)
    given = sum(120 + at for at in range(len(names)))
    total = {
        key: found.report["train"][key] + found.report["valid"][key]
        for key in found.report["train"]
    }
    assert total["rows"] == total["examples"] == given
    assert total["kept"] + total["dropped"] + total["untrained"] == given
    assert total["dropped"] and total["untrained"] == sum(
        -(-(120 + at) // 5) for at in range(len(names))
    )
    assert sum(map(len, found.train)) == found.report["train"]["kept"]
    assert len(found.valid) == found.report["valid"]["kept"] == len(found.test)
    prompts = {example.messages[0]["content"] for example in found.test}
    trained = {
        row.source for part in found.train for row in map(part.__getitem__, range(len(part)))
    }
    assert len(prompts) == len(found.test) and not trained & {e.source for e in found.test}


def test_the_split_moves_nothing_when_the_file_is_reordered(
    tmp_path: pathlib.Path, tokenizer: Any
) -> None:
    path = pathlib.Path(write(tmp_path / "a.jsonl", 50))
    lines = path.read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1]))
    held = []
    for name in ("a.jsonl", "b.jsonl"):
        source = load.Source(str(tmp_path / name), valid_fraction=0.2)
        found = load.load(source, tokenizer, seed=3, vocab_size=10**6)
        held.append({example.messages[0]["content"] for example in found.test})
    assert held[0] == held[1] and len(held[0]) == 10
