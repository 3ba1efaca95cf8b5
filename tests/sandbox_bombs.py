# SPDX-License-Identifier: Apache-2.0
"""Templates that take all the time or memory there is, rendered one after the other; run by test_sandbox.py.

Prints, for each, its name, seconds of processor time and what was said, as JSON. Memory is limited for the whole process.
"""

import json
import pathlib
import resource
import time
from typing import Any

from jft import errors, sandbox
from jft.sandbox import budget

ROOM = 700 << 20  # bytes beyond those after the imports
_DOUBLING = (
    "{% set ns = namespace(x=START) %}{% for i in range(100) %}{% set ns.x = NEXT %}{% endfor %}"
)
_NUMBERS = "{% set a = range(60000)|list %}{% set b = range(60000)|list %}"


def doubling(start: str, following: str, end: str = "{{ ns.x }}") -> str:
    return _DOUBLING.replace("START", start).replace("NEXT", following) + end


LONG = "'x' * 1000000"
BOMBS = {
    # Time.
    "a huge range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros that call twice": "{% macro m(n) %}{{ m(n-1) ~ m(n-1) if n else '' }}{% endmacro %}{{ m(99) }}",
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 40 + "{% endcall %}" * 40,
    "endless recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(0) }}",
    "a recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "comparisons in a loop": _NUMBERS + "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "comparisons in a row": _NUMBERS + "{% if a == b %}{% endif %}" * 1500,
    "searches": _NUMBERS + "{{ a|select('in', b)|list|length }}",
    "sorting": "{% for i in range(99999) %}{{ (range(60000)|list)|sort|first }}{% endfor %}",
    "sums of lists": "{{ ([[1]] * 60000)|sum(start=[])|length }}",
    "title of a long text": "{% for i in range(99999) %}{% set x = ('a b ' * 500000)|title %}{% endfor %}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "rounding": "{{ 1.5|round(10 ** 9, 'ceil') }}",
    # One value.
    "a repeated text": "{{ 'a' * 10 ** 9 }}",
    "a repeated list": "{{ ([0] * 10 ** 9)|length }}",
    "center": "{{ 'a'|center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "a width in %": "{{ '%1000000000d' % 1 }}",
    "a width behind a key": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "a width that is an argument of %": "{{ '%*d' % (10 ** 9, 1) }}",
    "a precision": "{{ '%.1000000000f' % 1.0 }}",
    "a width in the filter": "{{ '%1000000000d'|format(1) }}",
    "a width in format": "{{ '{:1000000000d}'.format(1) }}",
    "a width that is an argument of format": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "a width in format_map": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "many fields of format": "{% set b = " + LONG + " %}{{ ('{0}' * 99999).format(b) }}",
    "many fields of %": "{% set b = " + LONG + " %}{{ ('%(x)s' * 99999) % {'x': b} }}",
    "replace": "{{ (" + LONG + ").replace('x', " + LONG + ") }}",
    "the filter replace": "{{ (" + LONG + ")|replace('', " + LONG + ") }}",
    "join": "{{ range(99999)|join(" + LONG + ") }}",
    "join of one text": "{{ range(99999)|map('default', true)|map('replace', 'True', " + LONG + ")|join }}",
    "join by attribute": "{% set b = namespace(x=" + LONG + ") %}{{ ([b] * 99999)|join(attribute='x') }}",
    "indent": "{{ ('a\\n' * 1000000)|indent(9999) }}",
    "indent with a text": "{{ ('a\\n' * 100000)|indent(" + LONG + ") }}",
    "batch": "{{ [1]|batch(10 ** 9, 0)|list|length }}",
    "slice": "{{ [1]|slice(10 ** 9)|list|length }}",
    "an indent of JSON": "{{ [1, 2]|tojson(indent=10 ** 9) }}",
    "a separator of JSON": "{{ (range(60000)|list)|tojson(separators=(',', " + LONG + ")) }}",
    "translate": "{{ (" + LONG + ").translate({120: " + LONG + "}) }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 9, 'big')|length }}",
    "characters as a list": "{{ ('\\u4e00' * 2000000)|list|length }}",
    "pieces of a text": "{{ ('a ' * 2000000).split()|length }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    # Growth.
    "text that doubles": doubling("'ab'", "ns.x + ns.x"),
    "text that doubles by ~": doubling("'ab'", "ns.x ~ ns.x"),
    "a list that doubles": doubling("[1]", "ns.x + ns.x"),
    "numbers that square": doubling("10", "ns.x * ns.x"),
    "a list that holds itself twice": doubling("[1]", "[ns.x, ns.x]"),
    "a tuple as a key": doubling("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1}|length }}"),
    "an object that holds itself twice": doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "dict": doubling("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x == ns.x }}"),
    "views": doubling("{}", "{'a': ns.x.items(), 'b': ns.x.items()}"),
    "batches": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% for r in [ns.x]|batch(2, ns.x) %}{% set ns.x = r %}"
    "{% endfor %}{% endfor %}{{ ns.x }}",
    "arguments of a macro": "{% set ns = namespace(x=[1]) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(99) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    # Output, and what is kept of it.
    "text in a loop": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "text in a macro": "{% macro m() %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endmacro %}{{ m()|length }}",
    "blocks that are kept": "{% for k in range(9999) %}{% set a %}{% for i in range(8000) %}" + "x" * 1000 + "{% endfor %}{% endset %}"
    "{% endfor %}",
    "lists that are printed": _NUMBERS + "{{ a }}" * 5000,
    "lists that a macro prints": _NUMBERS + "{% macro m() %}" + "{{ a }}" * 1500 + "{% endmacro %}{{ m() }}",
    "slices that are kept": _NUMBERS + "".join(f"{{% set c{i} = a[:] %}}" for i in range(1500)),
    # The template itself.
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "ifs in ifs": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "fors in fors": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 9000 + "{% endif %}",
    "attributes of attributes": "{{ a" + ".b" * 20000 + " }}",
    "a sum": "{{ 1" + "+1" * 20000 + " }}",
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "filters": "{{ 1" + "|abs" * 9000 + " }}",
    "a long number": "{{ " + "9" * 5000 + " }}",
    "a long template": "x" * (sandbox.LONGEST + 1),
    "unclosed": "{{" * 60000,
}  # fmt: skip


class Tokenizer:
    special_tokens_map = {"eos_token": "</s>"}

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_chat_template(self, name: Any, tools: Any) -> str:
        return self.chat_template


def main() -> None:
    budget.SECONDS = 0.2
    sandbox.render(Tokenizer("{{ 1 }}"), [[{"role": "user", "content": "x"}]], (), True)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    for name, template in BOMBS.items():
        began = time.process_time()
        try:
            said = f"length {len(sandbox.render(Tokenizer(template), [[{'role': 'user'}]], (), True)[0])}"
        except errors.UserError as error:
            said = str(error)
        print(json.dumps([name, time.process_time() - began, said]))


if __name__ == "__main__":
    main()
