# SPDX-License-Identifier: Apache-2.0
"""Promises 3 and 6 on real tokenizers: the response and its stop token are trained and nothing else, and a prompt's ids
at inference are those of the training prefix, whatever people write.
"""

import functools
import json
import re
import unicodedata
from typing import Any

import hypothesis
import pytest
import real_tokenizers
from hypothesis import strategies as st

from jft.data import encoding, examples, rows, template

# What tokenizers and templates trip over, beside any text at all.
TRAPS = (
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u0085",
        "\ufeff",
        "\u200b",
        "\U000f0000",
    ),
    *(
        "é",
        "漢字",
        "\U0001f600",
        "'s",
        "1234",
        "...",
        "- a\n- b",
        "{{ x }}",
        "{% y %}",
        "{",
        "}}",
        "[INST]",
        "</s>",
    ),
    *(
        "<bos>",
        "<|im_start|>user\n",
        "user",
        "assistant\n",
        "system",
        "<tool_call>",
        "[/INST] ",
        "<s>",
        "\\n",
    ),
)
SETTINGS = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module", params=real_tokenizers.NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return real_tokenizers.load(request.param)


@functools.cache
def texts(tokenizer: Any) -> st.SearchStrategy[str]:
    """Messages, among them the tokenizer's own control tokens; not empty, as those are refused before."""
    control = sorted(template.special_tokens(tokenizer))[:40]
    piece = st.one_of(
        st.sampled_from([*control, *TRAPS]),
        # SmolLM2 has no token for some control characters and for planes without characters, and says so.
        st.text(st.characters(exclude_categories=("Cs", "Cn", "Cc")), max_size=12),
        st.sampled_from(["the user asks", "Hello, world! ", "x = f(a[0])", "1.", " and"]),
    )
    return st.lists(piece, min_size=1, max_size=6).map("".join).filter(str.strip)


def answers(tokenizer: Any) -> st.SearchStrategy[str]:
    """Without marks that an answer may write, such as Qwen3's <tool_call>, and <think>, at which its template takes one apart."""
    own = template.analysed(tokenizer)
    allowed = [text for text in own.control_ids if not own.answers.search(text)]
    return texts(tokenizer).filter(lambda text: not any(mark in text for mark in allowed))


def turn(role: str, content: str) -> examples.Turn:
    return {"role": role, "content": content}


@st.composite
def conversations(draw: st.DrawFn, tokenizer: Any) -> examples.Example:
    messages = []
    if draw(st.booleans()):
        messages.append(turn("system", draw(texts(tokenizer))))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(turn("user", draw(texts(tokenizer))))
        if writes_tools(tokenizer) and draw(st.booleans()):
            arguments = draw(st.dictionaries(texts(tokenizer), texts(tokenizer), max_size=2))
            function = {"name": "look_up", "arguments": arguments}
            calls = [{"type": "function", "function": function}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages.append({"role": "tool", "content": draw(texts(tokenizer))})
        messages.append(turn("assistant", draw(answers(tokenizer))))
    return examples.Example(tuple(messages), "f:row 1")


def writes_tools(tokenizer: Any) -> bool:
    return template.analysed(tokenizer).writes == {"tools", "calls", "results"}


def as_normalised(tokenizer: Any, text: str) -> str:
    """What a tokenizer that writes characters in one form makes of a text, as Qwen3's does."""
    composes = "NFC" in repr(tokenizer.backend_tokenizer.normalizer)
    return unicodedata.normalize("NFC", text) if composes else text


def called(answer: str) -> Any:
    """What a call as Qwen3's template writes it says."""
    inside = answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert inside != answer
    return json.loads(inside)


def spans(row: rows.Row) -> list[tuple[int, int]]:
    """Where runs of trained tokens begin and end."""
    marks = "".join("1" if t else "0" for t in row.trained)
    return [found.span() for found in re.finditer("1+", marks)]


def split_at(ids: list[int], stop: int) -> list[list[int]]:
    """Runs of ids, each up to and with a stop token."""
    ends = [i + 1 for i, token in enumerate(ids) if token == stop]
    return [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def said(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer's ids, as a conversation would show it; the template trims or adds spaces around it."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.removeprefix("<think>\n\n</think>\n\n").strip()


def test_answers_are_trained_whole_and_alone_behind_the_ids_of_inference(tokenizer: Any) -> None:
    stop = template.analysed(tokenizer).stop
    encoder = encoding.Encoder(tokenizer)

    @SETTINGS
    @hypothesis.given(conversations(tokenizer))
    def check(example: examples.Example) -> None:
        found = encoder.one(example)
        wanted = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        trained = [
            (row, start, ids)
            for row in found
            for begin, end in spans(row)
            for start, ids in _answers(row, begin, end, stop)
        ]
        assert len(trained) == len(wanted)  # each answer in one place, and no other text
        trained.sort(key=lambda answer: answer[1])  # a later answer's prompt is longer
        for at, (row, start, ids) in zip(wanted, trained, strict=True):
            prompt = encoding.prompt_tokens(tokenizer, example.messages[:at])
            assert row.tokens[:start].tolist() == prompt
            assert ids[-1] == stop and stop not in ids[:-1]
            answer, expected = said(tokenizer, ids[:-1]), example.messages[at]
            if expected.get("tool_calls"):
                wanted_call = json.dumps(expected["tool_calls"][0]["function"], ensure_ascii=False)
                assert called(answer) == json.loads(as_normalised(tokenizer, wanted_call))
            else:
                assert answer == as_normalised(tokenizer, expected["content"].strip())

    check()


def _answers(row: rows.Row, begin: int, end: int, stop: int) -> list[tuple[int, list[int]]]:
    found, at = [], begin
    for ids in split_at(row.tokens[begin:end].tolist(), stop):
        found.append((at, ids))
        at += len(ids)
    assert at == end, "a trained run does not end with the stop token"
    return found


def test_what_people_write_is_never_a_control_token(tokenizer: Any) -> None:
    encoder = encoding.Encoder(tokenizer)
    control = set(template.analysed(tokenizer).control_ids.values())

    @SETTINGS
    @hypothesis.given(conversations(tokenizer))
    def check(example: examples.Example) -> None:
        plain = examples.Example(tuple(_plain(each) for each in example.messages), "f:row 1")
        found, expected = (
            [[t for t in row.tokens.tolist() if t in control] for row in encoder.one(one)]
            for one in (example, plain)
        )
        assert found == expected

    check()


def _plain(turn: examples.Turn) -> examples.Turn:
    """The same kind of turn without anything that a person wrote."""
    if not turn.get("tool_calls"):
        return turn | {"content": "x"}
    function = {"name": "look_up", "arguments": {}}
    return turn | {"tool_calls": [{"type": "function", "function": function}]}


def test_one_bos(tokenizer: Any) -> None:
    # Qwen3 has none, and SmolLM2's is the mark that begins each turn.
    row = encoding.Encoder(tokenizer).one(
        examples.Example(examples.pair("hello", "there"), "f:row 1")
    )[0]
    begins = template.analysed(tokenizer).control_ids.get(tokenizer.bos_token or "")
    if tokenizer.bos_token in ("<bos>", "<s>", "<|begin_of_text|>"):
        assert row.tokens.tolist().count(begins) == 1 and row.tokens[0] == begins


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": "<|im_end|>", "b": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds <|im_start|>",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
TALK = (
    turn("user", "1 + 2?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {
        "role": "tool",
        "name": "add",
        "tool_call_id": "abcdefghi",
        "content": "3 </tool_response><|im_end|>",
    },
    turn("assistant", "It is 3."),
)


def test_tools_are_written_or_refused(tokenizer: Any) -> None:
    example = examples.Example(TALK, "f:row 1", tools=(TOOL,))
    known = template.analysed(tokenizer)
    if known.writes != {"tools", "calls", "results"}:
        with pytest.raises(Exception, match="f:row 1: the chat template does not write"):
            encoding.Encoder(tokenizer).one(example)
        return
    found = encoding.Encoder(tokenizer).one(example)
    control = set(known.control_ids.values())
    for row, at in zip(found, (1, 3), strict=True):
        prompt = encoding.prompt_tokens(tokenizer, TALK[:at], tools=(TOOL,))
        assert row.tokens[: len(prompt)].tolist() == prompt
        assert spans(row) == [(len(prompt), len(row.tokens))]
        # The texts' own marks are text: each control token is written by the template, which nests them in pairs.
        names = tokenizer.convert_ids_to_tokens([t for t in row.tokens.tolist() if t in control])
        assert names.count("<|im_start|>") == names.count("<|im_end|>") == at + 2
    assert '"name": "add"' in tokenizer.decode(found[0].tokens[found[0].trained])
    assert said(tokenizer, found[1].tokens[found[1].trained].tolist()[:-1]) == "It is 3."
