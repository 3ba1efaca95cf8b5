# SPDX-License-Identifier: Apache-2.0
"""Chat templates within limits: the texts are transformers', and what would take all time or memory ends in one line."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import sandbox_bombs

from jft import errors, sandbox
from jft.sandbox import budget

TURNS = [
    {"role": "system", "content": "Be  short.", "name": None},
    {"role": "user", "content": "caf\u00e9 <b> 'x' \"y\" %s {} {{ z }}\n\n  a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "thinking": "hm"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}]},
    {"role": "tool", "content": "r"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# What published templates do, and some that they could.
ORDINARY = {
    "loop": "{% for m in messages %}{{ loop.index0 ~ loop.first ~ loop.last ~ loop.length }}{{ m.role }}\n{% endfor %}",
    "loop with a test": "{% for m in messages if m.role != 'tool' %}{{ loop.revindex }}{{ m['content'] }}{% else %}-{% endfor %}",
    "break and continue": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role }}{% continue %}x{% endfor %}",
    "recursive loop": "{% for k in [[1, [2]], 3] recursive %}{{ loop(k) if k is iterable else k }}{% endfor %}",
    "namespace": "{% set ns = namespace(a=0, b='') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% set ns.b = ns.b + m.role %}"
    "{% endfor %}{{ ns.a }}{{ ns.b }}",
    "slices": "{% for m in messages[::-1] %}{{ m.role[:2] }}{% endfor %}{{ messages[1:]|length }}{{ messages[-1].role }}",
    "methods": "{% set c = messages[2].content %}{{ c.split('</think>')[-1].lstrip('\\n') }}{{ c.replace('h', 'xyz') }}"
    "{{ c.startswith('<') }}{{ c.upper().title().strip() }}{{ ', '.join(['a', 'b']) }}{{ 'a'.center(9) }}|{{ '7'.zfill(3) }}",
    "formats": "{{ '**%s** 12345 %5.2f%%' % ('a', 1.5) }}{{ '{:>6}|{a!r}|{{}}'.format('x', a=1) }}{{ '%s-%s'|format(1, 2) }}",
    "filters": "{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}"
    "{{ messages|rejectattr('role', 'in', ['user'])|first }}{{ ['b', 'a']|sort|join('-') }}{{ [1, 2]|sum }}{{ 'a\nb'|indent(2) }}"
    "{{ [3, 1]|max }}{{ 'x'|default('y') }}{{ nope|default('y') }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'a': 1}|items|list }}"
    "{{ 'a b'|title|replace('A', 'q') }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ 'abc'|reverse }}{{ 2.567|round(1) }}{{ ' x '|trim }}"
    "{{ [1, 1]|unique|list }}{{ messages|groupby('role')|length }}{{ '<'|e }}{{ 'a'|length }}{{ '5'|int + 1 }}{{ 'abcde'|truncate(4) }}",
    "JSON": "{{ messages|tojson }}{{ tools|tojson(indent=2) }}{{ messages|map(attribute='tool_calls')|select|first|tojson(sort_keys=True) }}",
    "tests": "{{ tools is defined }}{{ x is none }}{{ messages is string }}{{ 3 is divisibleby 3 }}{{ messages[0] is mapping }}",
    "macros": "{% macro m(a, b='q') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}]{% endmacro %}"
    "{{ m(1) }}{{ m(1, 2, 3, c=4) }}{% call m(7) %}inner{% endcall %}",
    "set block": "{% set x %}a{{ bos_token }}b{% endset %}{{ x|upper }}{% filter upper %}a{% endfilter %}{% with y = 3 %}{{ y }}{% endwith %}",
    "generation": "{% for m in messages %}{% generation %}{% set z = 1 %}{{ m.role }}{% endgeneration %}{% endfor %}{{ z is defined }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ -1 }}{{ 1 / 4 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 1.5 * 2 }}{{ true and 0 or 'x' }}",
    "white space": "  {%- if true -%}  a  {%- endif %}\n  {% if 1 %}\n  b\n  {% endif %}\n{# note #}\n  c\n",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{% if nothing %}a{% endif %}{{ documents }}{{ add_generation_prompt }}",
    "comparisons": "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 'user' in messages|map(attribute='role')|list }}{{ [1] == [1] }}{{ 1 != 2 }}",
    "objects": "{% set d = {'a': [1, messages[0]], 'b': (1, none)} %}{{ d }}{{ d.get('a')[0] }}{{ d.items()|list }}{{ dict(x=1) }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ 'name' in m }}{% endfor %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model: pathlib.Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("case", ORDINARY)
def test_texts_are_those_of_transformers(tokenizer: Any, case: str) -> None:
    tokenizer.chat_template = ORDINARY[case]
    theirs = tokenizer.apply_chat_template(
        [TURNS, TURNS[::-1]], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert sandbox.render(tokenizer, [TURNS, TURNS[::-1]], TOOLS, True) == theirs
    assert "".join(theirs)


def test_of_several_templates_the_one_for_tools_is_taken(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "d", "tool_use": "t"}
    assert sandbox.render(tokenizer, [TURNS], (), False) == ["d"]
    assert sandbox.render(tokenizer, [TURNS], TOOLS, False) == ["t"]


def test_bombs_end_soon_in_little_memory_and_say_why() -> None:
    script = pathlib.Path(sandbox_bombs.__file__)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in found] == list(sandbox_bombs.BOMBS)
    for name, seconds, said in found:
        assert said.startswith("the chat template "), f"{name}: {said}"
        assert "\n" not in said and "memory for" not in said or name == "elifs", f"{name}: {said}"
        # 0.2 s are allowed, and a template of 131,072 characters is compiled before.
        assert seconds < 4, f"{name}: {seconds} s"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% include 'x' %}", "has {% include %} in line 1"),
        ("\n{% extends 'x' %}", "has {% extends %} in line 2"),
        ("{% import 'x' as y %}", "has {% import %}"),
        ("{% block a %}{% endblock %}", "has {% block %}"),
        ("{% autoescape true %}{% endautoescape %}", "has {% autoescape %}"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "calls list.append, which is not available"),
        ("{{ messages[0].update({}) }}", "calls dict.update"),
        ("{{ raise_exception('not so') }}", "refuses the conversation: not so"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{{ [1, 2]|random }}", "No filter named 'random'"),
        ("{% if %}", "can't be read"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace can't hold '_x'"),
    ],
)
def test_what_a_template_may_not_do(tokenizer: Any, template: str, told: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(errors.UserError) as caught:
        sandbox.render(tokenizer, [TURNS], (), False)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_conversation_may_take_more(tokenizer: Any) -> None:
    """The limits are for templates, not for what a user has to say."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    turns = [{"role": "user", "content": "x" * budget.VALUE}] * 3
    assert len(sandbox.render(tokenizer, [turns], (), False)[0]) == 3 * budget.VALUE + 3


def test_time_is_that_of_the_processor(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does other things in between fails no row."""
    import time

    spent = [0.0, 10**6]
    monkeypatch.setattr(time, "monotonic", lambda: spent.append(0) or 10.0**6 * len(spent))
    tokenizer.chat_template = "{% for i in range(1000) %}{{ i }}{% endfor %}"
    assert sandbox.render(tokenizer, [TURNS], (), False)
