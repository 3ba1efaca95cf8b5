# SPDX-License-Identifier: Apache-2.0
"""Rows to examples: every shape as it is meant, by its columns' names or as stated."""

import json
import pathlib
import random
from typing import Any

import pytest

from jft import errors
from jft.data import examples, formats, split

Reading = formats.Reading
USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}
SYSTEM = {"role": "system", "content": "s"}
WEATHER = {"name": "weather", "description": "now", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": WEATHER}


def write(folder: pathlib.Path, name: str, *rows: object) -> str:
    path = folder / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def one(folder: pathlib.Path, row: object, **reading: Any) -> examples.Example:
    (example,) = formats.read(write(folder, "one.jsonl", row), Reading(**reading))
    return example


def kind(folder: pathlib.Path, row: object, **reading: Any) -> str:
    table = formats.Table(write(folder, "one.jsonl", row), Reading(**reading))
    assert table.shape is not None
    return table.shape.describe()


def pair(prompt: str, response: str, system: str = "") -> tuple[examples.Turn, ...]:
    return examples.pair(prompt, response, system)


@pytest.mark.parametrize(
    "row, told",
    [
        ({"prompt": "u", "response": "a"}, "prompt/response: prompt = 'prompt', response"),
        ({"Question ": "u", "ANSWER": "a"}, "prompt/response: prompt = 'Question ', response"),
        ({"inputs": "u", "targets": "a", "id": "7"}, "prompt/response: prompt = 'inputs'"),
        ({"context": "u", "continuation": "a"}, "prompt/response: prompt = 'context'"),
        ({"instruction": "u", "input": "", "output": "a"}, "alpaca: prompt = 'instruction', con"),
        ({"instruction": "u", "context": None, "response": "a"}, "alpaca: prompt = 'instruction'"),
        ({"instruction": "u", "response": "a", "text": "u a"}, "prompt/response: prompt = 'inst"),
        ({"query": "u", "choices": ["x", "a"], "gold": 1}, "multiple choice: prompt = 'query', "),
        ({"context_options": ["u", "x"], "continuation": "a", "gold": 0}, "multiple choice: ch"),
        ({"messages": [USER, BOT], "prompt": "u", "id": 7}, "messages: messages = 'messages'"),
        ({"conversations": [USER, BOT]}, "messages: messages = 'conversations'"),
        ({"messages": [HUMAN, GPT]}, "messages: messages = 'messages'"),
        ({"prompt": [USER], "completion": [BOT]}, "prompt/response: prompt = 'prompt', respons"),
        ({"conversations": [HUMAN], "response": GPT}, None),
        ({"prompt": "u", "response": "a", "label": "good"}, "prompt/response: "),
    ],
)
def test_one_conversation_in_many_shapes(
    tmp_path: pathlib.Path, row: dict[str, Any], told: str | None
) -> None:
    if told is None:  # a list of messages and a response: the user says which it is
        mapped = {"prompt": "conversations", "response": "response"}
        assert one(tmp_path, row, columns=mapped).messages == (USER, BOT)
        return
    assert one(tmp_path, row).messages == (USER, BOT)
    assert kind(tmp_path, row).startswith(told)


def test_alpaca(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "alpaca.jsonl",
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "in", "output": "o", "id": 7},
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "input": None, "output": "o", "system": "s"},
        {"instruction": "", "input": "in", "output": "o"},
    )
    table = formats.Table(path)
    found = [example.messages for example in formats.read(path)]
    asked = ["i", "i\n\nin", "i", "i", "in"]
    assert found == [pair(text, "o", "s" * (i == 3)) for i, text in enumerate(asked)]
    assert table.extra == ()  # known when the rows were read
    assert [type(row) for row in table] == [examples.Example] * 5
    assert table.extra == ("id",)
    # Naming the instruction doesn't take its input away.
    row = {"instruction": "i", "input": "in", "output": "o"}
    mapped = one(tmp_path, row, columns={"prompt": "instruction", "response": "output"})
    assert mapped.messages == pair("i\n\nin", "o")


def test_columns_settle_what_names_leave_open(tmp_path: pathlib.Path) -> None:
    row = {"question": "q", "response": "r", "completion": "c", "Text": "t", "context": "x"}

    def mapped(**columns: str) -> tuple[str, ...]:
        return tuple(turn["content"] for turn in one(tmp_path, row, columns=columns).messages)

    assert mapped(prompt="question", response="completion") == ("q", "c")
    assert mapped(prompt="Text", response="response", messages="") == ("t", "r")
    assert mapped(prompt="0", response="2", system="3") == ("t", "q", "c")
    assert one(tmp_path, row, columns={"text": "Text"}).text == "t"
    with pytest.raises(errors.UserError, match="'response', 'completion'.*data.columns.response="):
        mapped(prompt="question")
    with pytest.raises(errors.UserError, match="data.columns.response=compltion.*completion"):
        mapped(response="compltion")


def test_rows_without_names(tmp_path: pathlib.Path) -> None:
    by_place = {"prompt": "1", "response": "0"}
    expected = [pair("p", "r"), pair("q", "s")]
    path = write(tmp_path, "a.jsonl", ["r", "p", 7], ["s", "q"])
    assert [e.messages for e in formats.read(path, Reading(by_place))] == expected
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"r{separator}p\ns{separator}q\n")
        reading = Reading(by_place, header=False)
        table = formats.Table(str(tmp_path / name), reading)
        assert [row.messages for row in table if isinstance(row, examples.Example)] == expected
    (tmp_path / "b.csv").write_text("1,2\nr,p\n")  # a name goes before a place
    named = formats.read(str(tmp_path / "b.csv"), Reading({"prompt": "2", "response": "1"}))
    assert [e.messages for e in named] == expected[:1]


def test_text_and_its_separator(tmp_path: pathlib.Path) -> None:
    row = {"text": " Q: a\nA: b\nA: c", "id": 7}
    assert (one(tmp_path, row).text, one(tmp_path, row).messages) == (row["text"], ())
    split_up = one(tmp_path, row, separator="\nA: ")
    assert split_up.messages == pair(" Q: a\nA: ", "b\nA: c")
    assert "".join(turn["content"] for turn in split_up.messages) == row["text"]
    body = {"body": row["text"], "title": "t"}
    assert one(tmp_path, body, separator="A:", columns={"text": "body"}).messages[0]["content"] == (
        " Q: a\nA:"
    )


def test_openai_messages(tmp_path: pathlib.Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0},
        {"role": "user", "content": "v", "name": None, "tool_calls": []},
        {"role": "assistant", "content": "b", "weight": 1.0, "function_call": None},
    ]
    example = one(tmp_path, {"messages": turns, "tools": [TOOL, WEATHER], "parallel": True})
    function = {"name": "f", "arguments": {"x": [1]}}
    assert example.messages == (
        SYSTEM,
        {"role": "user", "content": "u!"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b", "weight": 1},
    )
    assert example.tools == (TOOL, TOOL)


def test_sharegpt_tool_calls_are_openais(tmp_path: pathlib.Path) -> None:
    """The same conversation in both spellings, and in OpenAI's older one."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    openai = [{"function": calls[0]}, {"type": "function", "function": {"name": "g"}}]
    result, answer = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "a"}
    sharegpt = [
        HUMAN,
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": "3"},
        GPT,
    ]
    new = [USER, {"role": "assistant", "content": "", "tool_calls": openai}, result, answer]
    rows = [
        {"conversations": sharegpt, "tools": json.dumps([WEATHER])},
        {"messages": new, "tools": [TOOL]},
        {"conversation": sharegpt, "functions": [WEATHER]},
    ]
    first, second, third = (one(tmp_path, row) for row in rows)
    assert first.messages == second.messages == third.messages
    assert first.tools == second.tools == third.tools == (TOOL,)
    old = {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    single = [HUMAN, {"from": "function_call", "value": json.dumps(calls[0])}, *sharegpt[2:]]
    older = [USER, old, {"role": "function", "content": "3"}, answer]
    assert (
        one(tmp_path, {"messages": older}).messages == one(tmp_path, {"messages": single}).messages
    )


def test_arguments_that_are_not_json_stay_text(tmp_path: pathlib.Path) -> None:
    for text in ('{"x": ', "[1]", '{"x": 1, "x": 2}', '"x"'):
        call = {"name": "f", "arguments": text}
        turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        found = one(tmp_path, {"messages": turns}).messages[1]["tool_calls"][0]["function"]
        assert found == call


def test_preferences_are_the_same_in_every_form(tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        {"question": [USER], "chosen": BOT, "rejected": [OTHER]},
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": "u", "chosen": [USER, BOT], "rejected": [USER, OTHER], "prompt_id": "7"},
        {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
    ]
    for row in rows:
        example = one(tmp_path, row)
        assert (example.messages, example.rejected) == ((USER, BOT), (OTHER,)), row
        assert kind(tmp_path, row).startswith("preference: ")
    longer = [SYSTEM, USER, BOT, USER]
    row = {"chosen": [*longer, BOT, USER, BOT], "rejected": [*longer, OTHER]}
    example = one(tmp_path, row)
    assert example.messages == (*longer, BOT, USER, BOT)
    assert example.rejected == (OTHER,)


def test_columns_settle_what_a_preference_is(tmp_path: pathlib.Path) -> None:
    row = {"prompt": "u", "messages": [USER, BOT], "chosen": [USER, BOT], "rejected": [USER, OTHER]}
    by_prompt = one(tmp_path, row, columns={"prompt": "prompt"})
    assert (by_prompt.messages, by_prompt.rejected) == ((USER, BOT), (OTHER,))
    talk = {**row, "messages": [SYSTEM, USER], "chosen": "a", "rejected": "b"}
    by_list = one(tmp_path, talk, columns={"messages": "messages", "chosen": "chosen"})
    assert (by_list.messages, by_list.rejected) == ((SYSTEM, USER, BOT), (OTHER,))
    plain = one(tmp_path, row, columns={"messages": "messages"})
    assert (plain.messages, plain.rejected) == ((USER, BOT), ())


def test_chosen_alone_on_request(tmp_path: pathlib.Path) -> None:
    row = {"prompt": "u", "chosen": "a", "rejected": "b"}
    example = one(tmp_path, row, columns={"response": "chosen"})
    assert (example.messages, example.rejected) == ((USER, BOT), ())
    table = formats.Table(write(tmp_path, "a.jsonl", row), Reading({"response": "chosen"}))
    assert len(list(table)) == 1 and table.extra == ("rejected",)


def test_labels(tmp_path: pathlib.Path) -> None:
    for row in ({"messages": [USER, BOT]}, {"prompt": "u", "completion": "a"}):
        for label in (True, False):
            example = one(tmp_path, {**row, "label": label})
            assert (example.messages, example.label) == ((USER, BOT), label)
        for label, meant in ((1, True), (0, False), ("true", True), ("False", False), ("0", False)):
            labelled = {**row, "good": label}
            assert one(tmp_path, labelled).label is None
            assert one(tmp_path, labelled, columns={"label": "good"}).label is meant
            assert one(tmp_path, {**row, "label": label}).label is None


def test_a_table_is_read_anew_each_time_and_whole(tmp_path: pathlib.Path) -> None:
    good = {"prompt": "p", "response": "r"}
    rows = [["p"], {"prompt": ""}, {"prompt": " ", "response": "r"}, good, {}, good, 7]
    table = formats.Table(write(tmp_path, "a.jsonl", *rows))
    first, second = list(table), list(table)
    assert first == second
    assert [row.number for row in first] == list(range(1, len(rows) + 1))
    assert [i for i, row in enumerate(first) if isinstance(row, examples.Example)] == [3, 5]
    assert table.shape is not None and table.shape.kind == "prompt/response"
    example = first[3]
    assert isinstance(example, examples.Example)
    place = (example.source, example.path, example.number)
    assert place == (f"{table.files[0]}:row 4", table.files[0], 4)


# Row counts from the data folder's own table; the shape is what each set's format is called there.
KNOWN: dict[str, tuple[int, str, Reading]] = {
    "dolly_hhrlhf_small": (1000, "prompt/response", Reading()),
    "wikisql_mlx/train.jsonl": (1000, "prompt/response", Reading(separator="\nA: ")),
    "wikisql_mlx/valid.jsonl": (100, "prompt/response", Reading(separator="\nA: ")),
    "wikisql_mlx/test.jsonl": (100, "prompt/response", Reading(separator="\nA: ")),
    "e2e_nlg/devset.csv": (4672, "prompt/response", Reading({"prompt": "mr", "response": "ref"})),
    "e2e_nlg/testset_w_refs.csv": (
        4693,
        "prompt/response",
        Reading({"prompt": "0", "response": "1"}),
    ),
    "banking77/train.csv": (
        10003,
        "prompt/response",
        Reading({"prompt": "text", "response": "category"}),
    ),
    "banking77/test.csv": (
        3080,
        "prompt/response",
        Reading({"prompt": "text", "response": "category"}),
    ),
    "gsm8k/train.jsonl": (7473, "prompt/response", Reading()),
    "gsm8k/test.jsonl": (1319, "prompt/response", Reading()),
    "dpo_en_demo": (300, "preference", Reading()),
    "kto_en_demo": (300, "unpaired", Reading()),
    "glaive_toolcall_en": (300, "messages", Reading()),
    "fastchat_sharegpt": (500, "messages", Reading()),
    "identity_persona": (91, "alpaca", Reading()),
    "alpaca_en_demo": (999, "alpaca", Reading()),
    "wikitext2/test.txt": (1, "text", Reading()),
    "wikitext2/valid.txt": (1, "text", Reading()),
    "tinyshakespeare": (1, "text", Reading()),
    "evals_small/arc_easy.jsonl": (2376, "multiple choice", Reading()),
    "evals_small/copa.jsonl": (100, "multiple choice", Reading()),
    "evals_small/lambada_openai.jsonl": (5153, "prompt/response", Reading()),
    "evals_small/piqa.jsonl": (1838, "multiple choice", Reading()),
    "evals_small/winograd_wsc.jsonl": (273, "multiple choice", Reading()),
    "evals_small/winogrande.jsonl": (1267, "multiple choice", Reading()),
    "torchtune_tiny/alpaca_tiny.json": (100, "alpaca", Reading()),
    "torchtune_tiny/chat_tiny.json": (1, "messages", Reading()),
    "torchtune_tiny/hh_rlhf_tiny.json": (1, "preference", Reading()),
    "torchtune_tiny/instruct_tiny.json": (2, "prompt/response", Reading()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_real_files(shared: pathlib.Path, name: str) -> None:
    count, kind, reading = KNOWN[name]
    table = formats.Table(str(shared / "data" / name), reading)
    assert [row for row in table if isinstance(row, examples.Fault)] == []
    assert (sum(1 for _ in table), table.shape and table.shape.kind) == (count, kind)


def test_details_of_real_files(shared: pathlib.Path) -> None:
    data = shared / "data"
    calls = [
        turn["tool_calls"]
        for example in formats.read(str(data / "glaive_toolcall_en"))
        for turn in example.messages
        if "tool_calls" in turn
    ]
    assert len(calls) == 211
    assert all(isinstance(c["function"]["arguments"], dict) for call in calls for c in call)
    pairs = formats.read(str(data / "dpo_en_demo"))
    assert sum(e.messages[0]["role"] == "system" for e in pairs) == 80
    assert all(len(e.rejected) == 1 and e.rejected[0] != e.messages[-1] for e in pairs)
    choice = formats.read(str(data / "evals_small" / "copa.jsonl"))[0].messages
    assert choice[1]["content"] == "water flowed from the spout."
    prompt, response = formats.read(
        str(data / "wikisql_mlx" / "test.jsonl"), Reading(separator="\nA: ")
    )[0].messages
    assert prompt["content"].endswith("\nA: ") and response["content"].startswith("SELECT")


def examples_of(prompts: list[str]) -> list[examples.Example]:
    return [examples.Example(examples.pair(p, f"r{i}"), f"row {i}") for i, p in enumerate(prompts)]


def test_split_keeps_equal_prompts_together_and_ignores_order() -> None:
    rows = examples_of([f"prompt {i % 60}" for i in range(200)] + ["PROMPT  3", "prompt 3 "])
    train, valid = split.split(rows, 0.2, seed=1)
    assert sorted(e.source for e in train + valid) == sorted(e.source for e in rows)
    assert 30 <= len(valid) <= 40

    def prompts(part: list[examples.Example]) -> set[str]:
        return {" ".join(e.messages[0]["content"].split()).casefold() for e in part}

    assert not prompts(train) & prompts(valid)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {e.source for e in split.split(shuffled, 0.2, seed=1)[1]} == {e.source for e in valid}
    assert {e.source for e in split.split(rows, 0.2, seed=2)[1]} != {e.source for e in valid}


def test_split_of_few_examples() -> None:
    train, valid = split.split(examples_of(["a", "b"]), 0.01, seed=0)
    assert (len(train), len(valid)) == (1, 1)
    assert split.split(examples_of(["a", "b"]), 0.0, seed=0)[1] == []
    assert split.split(examples_of(["a"]), 0.5, seed=0)[1] == []
    with pytest.raises(errors.UserError, match="same prompt"):
        split.split(examples_of(["a", "A "]), 0.5, seed=0)
    with pytest.raises(errors.UserError, match="fraction is 1"):
        split.split(examples_of(["a", "b"]), 1, seed=0)
