# SPDX-License-Identifier: Apache-2.0
"""Template holes and what models say of themselves are found in prose, and braces of code are not."""

import pytest

from jft.data import examples, findings
from jft.data.checks import found, parts, placeholders


def told(text: str, part: str = parts.ANSWER) -> list[findings.Finding]:
    places = found.Places()
    row = places.add("a.jsonl", 1, valid=False)
    check = placeholders.Placeholders()
    check.add(row, text, part)
    return check.told(places)


def patterns(text: str, part: str = parts.ANSWER) -> set[str]:
    return {name for finding in told(text, part) for name in finding.details["patterns"]}


HOLES = {
    "I am {{name}}, an AI assistant developed by {{author}}.": "{{name}}",
    "您好，我是 {{name}}，由 {{author}} 开发。": "{{name}}",
    "我是{{name}}。": "{{name}}",
    "Dear {{ first name }},\nthank you.": "{{name}}",
    "Hello {name}, welcome to {company}!": "{name}",
    "Best regards,\n[Your Name]": "[Your Name]",
    "Dear [Recipient's Name],": "[Your Name]",
    "Time: [insert time]": "[Your Name]",
    "Hi <insert name here>, I am running late.": "<insert ...>",
    "TODO: write the rest": "TODO",
    "TBD": "TODO",
    "Lorem ipsum dolor sit amet": "lorem ipsum",
    "As an AI language model, I cannot tell.": "as an AI",
    "Well, as an AI, I have no body.": "as an AI",
    "As of my knowledge cutoff in 2021, it was so.": "as an AI",
    "I'm sorry, but I can't assist with that.": "refusal",
    "I cannot help with that request.": "refusal",
    "a species of <unk> lobster": "<unk>",
}

CLEAN = [
    '{"name": "f", "arguments": {"name": "x", "list": [{"a": {}}]}}',
    r"\frac{{a}}{b} and \text{name} and x_{{ij}}",
    "f'{name} is {{age}}'",
    'print(f"Hello {name}")',
    "Use `{{ user.name }}` in a template.",
    "```html\n<p>{{ message }}</p>\n```\nshows the message.",
    "<li>{{ item }}</li>",
    "<div style={{color: 'red'}}>",
    "${name} and {{{raw}}}",
    "'Hello {name}'.format(name=n)",
    "The set {a, b} and the interval [0, 1].",
    "See [your profile](https://a.b/c).",
    "[Enter FATHER and MOTHER]\nFATHER: By heaven!",
    "```\nx = '<your key>'\n# TODO: more\n```",
    "if a < b and your c > d: go",
    "My todo list is long.",
    "AI is a field; an AI can play chess.",
    "I am sorry for your loss; it will get better.",
    "I can not only sing but dance.",
    "The unknown soldier",
]


@pytest.mark.parametrize("text", HOLES)
def test_holes_are_found(text: str) -> None:
    assert patterns(text) == {HOLES[text]}


@pytest.mark.parametrize("text", CLEAN)
def test_look_alikes_are_not(text: str) -> None:
    assert patterns(text) == set()


def test_only_holes_are_to_be_removed() -> None:
    removed = {text for text in HOLES if told(text)[0].details.get("fix") == "remove"}
    assert removed == {text for text, name in HOLES.items() if name not in ("refusal", "<unk>")}
    assert {told(text)[0].severity for text in removed} == {"warning"}
    assert {told(text)[0].severity for text in set(HOLES) - removed} == {"note"}


def test_answers_only() -> None:
    for part in (parts.CONTEXT, parts.REJECTED):
        found_there = {text for text in HOLES if patterns(text, part)}
        assert found_there == {
            text for text, name in HOLES.items() if name in ("{{name}}", "<unk>")
        }
    finding = told("I am {{name}}.", parts.CONTEXT)[0]
    assert finding.details["parts"] == {"context": 1}
    assert "1 not in an answer" in finding.message


def test_parts_of_an_example() -> None:
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    )
    worse = ({"role": "assistant", "content": "c"},)
    example = examples.Example(turns, "", rejected=worse)
    said = [("s", "context"), ("u", "context"), ("a", "context"), ("v", "context")]
    assert list(parts.parts(example)) == [*said, ("r\nb", "answer"), ("c", "rejected")]
    bad = examples.Example(examples.pair("u", "a"), "", label=False)
    assert list(parts.parts(bad)) == [("u", "context"), ("a", "rejected")]
    assert list(parts.parts(examples.Example((), "", text="t"))) == [("t", "answer")]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "é"}}]}
    assert list(parts.parts(examples.Example((called,), "")))[0][0].endswith('"é"}}]')
