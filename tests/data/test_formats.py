# SPDX-License-Identifier: Apache-2.0
"""Files to examples: values survive exactly, and each fault is one line that names its place."""

import gzip
import json
import pathlib
import random

import pytest

from jft import errors
from jft.data import formats, split


def write(folder: pathlib.Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def texts(examples: list[formats.Example]) -> list[tuple[str, ...]]:
    return [tuple(turn["content"] for turn in example.messages) for example in examples]


# What readers that infer types, split lines or strip values get wrong.
AWKWARD = ["007", "1e5", "NA", "null", "True", " spaced ", "a\u2028b\u0085c", 'say "x"', "é\ufeff"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_awkward_values_survive_every_format(tmp_path: pathlib.Path, kind: str) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": text, "response": text[::-1]} for text in AWKWARD]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_bytes(jsonl(*rows).encode())
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.writer(file)
                writer.writerow(["prompt", "response"])
                writer.writerows([row["prompt"], row["response"]] for row in rows)
            else:
                file.write("prompt\tresponse\r\n")
                file.writelines(f"{row['prompt']}\t{row['response']}\r\n" for row in rows)
    assert texts(formats.read(str(path))) == [(text, text[::-1]) for text in AWKWARD]


def test_bom_crlf_and_blank_lines_are_no_content(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        b'\xef\xbb\xbf{"prompt": "p", "response": "r"}\r\n\r\n{"prompt": "q", "response": "s"}\r\n',
    )
    examples = formats.read(path)
    assert texts(examples) == [("p", "r"), ("q", "s")]
    assert examples[1].source == f"{path}:row 3"  # in JSONL a row's number is its line
    path = write(tmp_path, "a.csv", b'\xef\xbb\xbfprompt,response\r\n"a\r\nb",c\r\n\r\n')
    assert texts(formats.read(path)) == [("a\r\nb", "c")]


def test_json_lines_under_the_name_json(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "a.json",
        jsonl({"prompt": "p", "response": "r"}, {"prompt": "q", "response": "s"}),
    )
    assert texts(formats.read(path)) == [("p", "r"), ("q", "s")]


def test_shapes(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "alpaca.jsonl",
        jsonl(
            {"instruction": "i", "input": "", "output": "o"},
            {"instruction": "i", "input": "in", "output": "o", "id": 7},
            {"instruction": "i", "output": "o"},
            {"instruction": "i", "input": None, "output": "o", "system": "s"},
        ),
    )
    table = formats.read_table(path)
    assert texts(list(table.examples)) == [
        ("i", "o"),
        ("i\n\nin", "o"),
        ("i", "o"),
        ("s", "i", "o"),
    ]
    assert (table.shape.kind, table.extra) == ("alpaca", ("id",))

    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    shared = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    path = write(tmp_path, "chat.jsonl", jsonl({"messages": turns}))
    assert formats.read(path)[0].messages == tuple(turns)
    path = write(tmp_path, "sharegpt.jsonl", jsonl({"conversations": shared, "system": "s"}))
    assert formats.read(path)[0].messages == ({"role": "system", "content": "s"}, *turns)


def test_naming_the_instruction_keeps_its_input(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "a.jsonl", jsonl({"instruction": "i", "input": "in", "output": "o"}))
    mapped = formats.read(path, {"prompt": "instruction", "response": "output"})
    assert texts(mapped) == [("i\n\nin", "o")]


def test_columns_settle_what_names_leave_open(tmp_path: pathlib.Path) -> None:
    row = {"question": "q", "response": "r", "completion": "c", "Text": "t"}
    path = write(tmp_path, "a.jsonl", jsonl(row))
    with pytest.raises(errors.UserError, match="'response', 'completion'.*data.columns.response="):
        formats.read(path)
    assert texts(formats.read(path, {"response": "completion"})) == [("q", "c")]
    chosen = {"prompt": "Text", "response": "response", "messages": ""}
    assert texts(formats.read(path, chosen)) == [("t", "r")]
    with pytest.raises(errors.UserError, match="data.columns.response=compltion.*completion"):
        formats.read(path, {"response": "compltion"})
    with pytest.raises(errors.UserError, match="data.columns.promt: unknown key.*prompt"):
        formats.read(path, {"promt": "Text"})


GOOD = {"prompt": "p", "response": "r"}
USER = {"role": "user", "content": "u"}
FAULTS = {
    "broken": (
        '{"prompt": "p", "response": "r"}\n{"prompt": "p" "response"}\n',
        ":2: bad JSON, column 16",
    ),
    "twice": (
        '{"prompt": "p", "prompt": "q", "response": "r"}\n',
        ":1: bad JSON: key 'prompt' stands twice",
    ),
    "list": (jsonl(GOOD, ["p", "r"]), ":row 2: holds a list of 2, not an object"),
    "missing": (jsonl(GOOD, {"prompt": "p"}), ":row 2: has no 'response'"),
    "empty": (jsonl(GOOD, {"prompt": "p", "response": " \n"}), ":row 2: the response .* is empty"),
    "no prompt": (jsonl({"prompt": "", "response": "r"}), ":row 1: the prompt .* is empty"),
    "number": (
        jsonl(GOOD, {"prompt": "p", "response": 5}),
        r":row 2: the response .* a number \(5\)",
    ),
    "null": (jsonl({"prompt": "p", "response": None}), ":row 1: the response .* is null"),
    "mixed": (
        jsonl(GOOD, {"messages": [USER]}),
        ":row 2: has no 'prompt'.*one file holds one shape",
    ),
    "renamed": (jsonl(GOOD, {**GOOD, "answer": "a"}), ":row 2: 'response', 'answer' could each"),
    "surrogate": ('{"prompt": "\\ud800", "response": "r"}\n', ":row 1: .*surrogate"),
    "text only": (jsonl({"text": "t"}), ":row 1: no prompt column among 'text'"),
    "last": (jsonl({"messages": [USER]}), ":row 1: the last turn is the user's"),
    "role": (jsonl({"messages": [{"role": "tool", "content": "x"}]}), "message 1 has role 'tool'"),
    "parts": (jsonl({"messages": [{"role": "user", "content": [1]}]}), "message 1: .* a list of 1"),
    "tools": (jsonl({"messages": [{**USER, "tool_calls": [1]}]}), "message 1 has 'tool_calls'"),
    "nothing": ("", "holds no rows .0 bytes."),
    "latin": (b'{"prompt": "p", "response": "\xe9"}\n', ":1: not UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_with_the_place(tmp_path: pathlib.Path, fault: str) -> None:
    content, message = FAULTS[fault]
    with pytest.raises(errors.UserError, match=message) as caught:
        formats.read(write(tmp_path, "train.jsonl", content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "train.jsonl"))


def test_faults_of_files(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "train.jsonl", jsonl(GOOD))
    with pytest.raises(errors.UserError, match="no such file; the folder holds train.jsonl"):
        formats.read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(errors.UserError, match="is a folder"):
        formats.read(str(tmp_path))
    with pytest.raises(errors.UserError, match="unknown extension '.gz'; known are .jsonl"):
        formats.read(write(tmp_path, "a.jsonl.gz", gzip.compress(b"")))
    with pytest.raises(errors.UserError, match="holds an object, not a list of rows"):
        formats.read(write(tmp_path, "a.json", json.dumps(GOOD)))
    with pytest.raises(errors.UserError, match=":2: bad JSON, column 17"):
        formats.read(write(tmp_path, "b.json", '[{"prompt": "p",\n "response": "r"]]'))
    with pytest.raises(errors.UserError, match="not a Parquet file"):
        formats.read(write(tmp_path, "a.parquet", b"PAR1 no"))
    with pytest.raises(errors.UserError, match=":4: row 2 has 3 fields, the header has 2"):
        formats.read(write(tmp_path, "a.csv", 'prompt,response\n"a\nb",c\nd,e,f\n'))
    with pytest.raises(errors.UserError, match=":3: bad quoting in row 2"):
        formats.read(write(tmp_path, "b.csv", 'prompt,response\na,b\n"c,d\ne,f\n'))
    with pytest.raises(errors.UserError, match="'prompt' stands twice"):
        formats.read(write(tmp_path, "c.csv", "prompt,prompt\na,b\n"))


def test_bare_quotes_in_tsv_swallow_nothing(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "a.tsv", 'prompt\tresponse\n"a\tb\nc\td"\n')
    assert texts(formats.read(path)) == [('"a', "b"), ("c", 'd"')]


def test_long_csv_fields(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "a.csv", f"prompt,response\n{'x' * 200_000},y\n")
    assert len(formats.read(path)[0].messages[0]["content"]) == 200_000


def test_real_files(shared: pathlib.Path) -> None:
    # Row counts from the data folder's own table.
    text = {"prompt": "text", "response": "category"}
    known = {
        "dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl": (None, 1000, "prompt/response"),
        "alpaca_en_demo/alpaca_en_demo.json": (None, 999, "alpaca"),
        "identity_persona/identity.json": (None, 91, "alpaca"),
        "banking77/train.csv": (text, 10003, "prompt/response"),
        "e2e_nlg/devset.csv": ({"prompt": "mr", "response": "ref"}, 4672, "prompt/response"),
        "gsm8k/test.jsonl": (None, 1319, "prompt/response"),
        "kto_en_demo/kto_en_demo.json": (None, 300, "messages"),
        "fastchat_sharegpt/dummy_conversation.json": (None, 500, "messages"),
    }
    for name, (columns, count, kind) in known.items():
        table = formats.read_table(str(shared / "data" / name), columns)
        assert (len(table.examples), table.shape.kind) == (count, kind), name


def examples_of(prompts: list[str]) -> list[formats.Example]:
    return [formats.Example(formats.pair(p, f"r{i}"), f"row {i}") for i, p in enumerate(prompts)]


def test_split_keeps_equal_prompts_together_and_ignores_order() -> None:
    examples = examples_of([f"prompt {i % 60}" for i in range(200)] + ["PROMPT  3", "prompt 3 "])
    train, valid = split.split(examples, 0.2, seed=1)
    assert sorted(e.source for e in train + valid) == sorted(e.source for e in examples)
    assert 30 <= len(valid) <= 40

    def prompts(part: list[formats.Example]) -> set[str]:
        return {" ".join(e.messages[0]["content"].split()).casefold() for e in part}

    assert not prompts(train) & prompts(valid)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert {e.source for e in split.split(shuffled, 0.2, seed=1)[1]} == {e.source for e in valid}
    assert {e.source for e in split.split(examples, 0.2, seed=2)[1]} != {e.source for e in valid}


def test_split_of_few_examples() -> None:
    train, valid = split.split(examples_of(["a", "b"]), 0.01, seed=0)
    assert (len(train), len(valid)) == (1, 1)
    assert split.split(examples_of(["a", "b"]), 0.0, seed=0)[1] == []
    assert split.split(examples_of(["a"]), 0.5, seed=0)[1] == []
    with pytest.raises(errors.UserError, match="same prompt"):
        split.split(examples_of(["a", "A "]), 0.5, seed=0)
    with pytest.raises(errors.UserError, match="fraction is 1"):
        split.split(examples_of(["a", "b"]), 1, seed=0)
