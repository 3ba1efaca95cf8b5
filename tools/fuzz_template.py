# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: chat templates, put together from expressions and statements that a hostile one would use."""

import pathlib
import random
import re
import resource
from typing import Any

import fuzz_mutations

from jft import errors, sandbox

ROOM = 1 << 30  # bytes that may be taken beyond what there was
# Of each kind of value: how it is written. t, l, n, d and a stand for a text, a list, a number, an object, anything.
FORMS: dict[str, tuple[str, ...]] = {
    "t": (
        *("''", "'a'", "'ab '", "' %s '", "'{}{}'", "'%(a)9999s'", "'\\n'", "ns.x", "ns.x", "ns.x", "x"),
        *("t + t", "t + t", "t ~ a", "a ~ a ~ a", "t * n", "t % a", "t % (a, a)", "'%1000000000d' % n", "'%*d' % (n, n)"),
        *("t.join(l)", "l|join(t)", "t|replace(t, t)", "t.replace(t, t)", "t|center(n)", "t.ljust(n)", "t.zfill(n)"),
        *("t.format(a, a)", "'{:1000000000}'.format(n)", "'{:{}}'.format(n, n)", "t|format(a)", "t.format_map(d)"),
        *("t|indent(n)", "t|indent(t)", "a|string", "a|tojson", "a|tojson(indent=n)", "t|upper", "t|title", "t|trim"),
        *("t[n:]", "t[::-1]", "t[n:n:n]", "l|first", "l|last", "t|truncate(n)", "t.expandtabs(n)"),
        *("t|urlencode", "t|e", "t|safe", "strftime_now(t)", "m(a, b=a)", "caller()", "t.translate(d)"),
        *("t.removeprefix(t)", "t.split(t)[0]", "t.strip(t)", "n|filesizeformat", "(t if a else t)"),
    ),
    "l": (
        *("[]", "messages", "messages", "ns.y", "ns.y", "ns.y", "varargs", "tools", "range(9)", "range(100000)", "()"),
        *("[a, a]", "[l, l]", "(l, l)", "[ns.y, ns.y]", "l + l", "l + l", "l * n", "l[n:]", "l[::-1]", "range(n)"),
        *("t.split(t)", "t.splitlines()", "t|list", "l|list", "d.items()", "d|items|list", "d|dictsort", "d.values()"),
        *("l|map('string')|list", "l|map('replace', t, t)|list", "l|map('center', n)|list", "l|map(attribute=t)|list"),
        *("l|batch(n, a)|list", "l|slice(n, a)|list", "l|sort", "l|unique|list", "l|groupby(n)", "l|groupby('role')"),
        *("l|select('in', l)|list", "l|reject('eq', a)|list", "l|selectattr('role')|list", "l|reverse|list"),
        *("t.partition(t)", "l.copy()", "dict(a=l).items()", "(l if a else l)", "l|map('list')|list", "[namespace(a=ns)]"),
    ),
    "n": (
        *("0", "1", "2", "-1", "9", "63", "1000", "99999", "10**9", "2**62", "0.5", "1e308", "loop.index", "loop.length"),
        *("n + n", "n - n", "n * n", "n * n", "n ** n", "n ** n", "n / n", "n // n", "n % n", "-n", "l|length", "t|length"),
        *("l|sum", "l|sum(start=l)", "n|round(n)", "n|round(n, 'ceil')", "t|int", "t|float", "n|abs", "l|max", "l|min"),
        *("t.count(t)", "t.find(t)", "l.count(a)", "l.index(a)", "n.bit_length()", "n.to_bytes(n, 'big')", "t|wordcount"),
    ),
    "d": (
        *("{}", "{'a': a, 'b': a}", "{'a': l, 'b': l}", "dict(a=a, b=a)", "messages[0]", "message", "kwargs"),
        *("{'a': d, 'b': d}", "d.copy()", "dict(d, x=d)", "{}.fromkeys(l, a)", "{t: a}", "{l: a}"),
    ),
    "a": (
        *("t", "t", "t", "l", "l", "l", "n", "d", "none", "true", "a == a", "a != a", "l == l", "l < l", "t in t"),
        *("a in l", "a is defined", "a is in l", "a is eq a", "a is mapping", "not a", "a and a", "a or a"),
        *("a|default(a)", "namespace(a=a, b=a)", "namespace(a=ns, b=ns)", "cycler(a, a).next()", "joiner(t)"),
        *("ns", "a|attr(t)", "range.__globals__", "l.append(a)"),
        *("t.encode(t)", "loop.cycle(a, a)", "loop(l)", "loop.changed(l)", "d.update(d)", "d[t]", "d.a", "l[n]"),
    ),
}  # fmt: skip
_PLACES = re.compile(r"(?<![\w'.{:])[tlnda](?![\w'}=:(])")


def expression(source: random.Random, depth: int, kind: str = "a") -> str:
    """An expression of a kind, of at most so many levels."""
    forms = FORMS[kind]
    for _ in range(20):
        form = source.choice(forms)
        if depth > 0 or not _PLACES.search(form):
            break
    else:
        form = {"t": "'a'", "l": "[]", "n": "1", "d": "{}", "a": "none"}[kind]
    written = _PLACES.sub(lambda found: expression(source, depth - 1, found[0]), form)
    return f"({written})" if " " in form or "|" in form else written


def statements(source: random.Random, depth: int) -> str:
    return "".join(_statement(source, depth) for _ in range(source.randint(1, 4)))


def _statement(source: random.Random, depth: int) -> str:
    def inner() -> str:
        return statements(source, depth - 1)

    def value() -> str:
        return expression(source, source.randint(0, 5), source.choice("aatl"))

    if depth <= 0:
        return source.choice(("text ", "{{ " + value() + " }}", "{{ m(x) }}"))
    match source.randint(0, 9):
        case 0 | 1:
            name, kind = source.choice(("xt", "yl"))
            return (
                "{% set ns." + name + " = " + expression(source, source.randint(1, 4), kind) + " %}"
            )
        case 2:
            return "{% set x = " + value() + " %}"
        case 3 | 4:
            over = source.choice(
                ("messages", "range(100000)", "range(9)", expression(source, 3, "l"))
            )
            more = source.choice(("", "", " recursive", f" if {value()}"))
            return "{% for x in " + over + more + " %}" + inner() + "{% endfor %}"
        case 5:
            return "{% if " + value() + " %}" + inner() + "{% else %}" + inner() + "{% endif %}"
        case 6:
            return "{% macro m(a=1, b=2) %}" + inner() + "{% endmacro %}"
        case 7:
            return "{% set x %}" + inner() + "{% endset %}"
        case 8:
            return "{% call m(" + value() + ") %}" + inner() + "{% endcall %}"
    name = source.choice(("filter upper", "generation", "with a = ns.x"))
    return "{% " + name + " %}" + inner() + "{% end" + name.split()[0] + " %}"


class _Tokenizer:
    """What rendering needs of one."""

    special_tokens_map = {"eos_token": "</s>"}

    def __init__(self, source: str) -> None:
        self.chat_template = source

    def get_chat_template(self, name: Any, tools: Any) -> str:
        return self.chat_template


class Template:
    conversation = [{"role": "user", "content": "Hello, how are you?"}] * 3

    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return ()

    def make(self, source: random.Random) -> dict[str, bytes]:
        text = (
            "{% set ns = namespace(x='ab', y=[1]) %}{% macro m(a=1, b=2) %}{{ a }}{{ b }}{% endmacro %}{% set x = 'x' %}"
            * (source.random() < 0.9)
        )
        text += statements(source, source.randint(1, 4))
        if source.random() < 0.3:  # grow by doubling
            text += (
                "{% for i in range(100000) %}"
                + statements(source, 2)
                + "{% endfor %}{{ ns.x }}{{ ns.y }}"
            )
        written = text.encode()
        return {
            "t.jinja": fuzz_mutations.spoil_bytes(source, written)
            if source.random() < 0.2
            else written
        }

    def read(self, folder: pathlib.Path) -> str:
        text = (folder / "t.jinja").read_bytes().decode(errors="replace")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = sandbox.render(_Tokenizer(text or "x"), [self.conversation], (), True)
        except errors.UserError as error:
            what = "limited" if "set data.chat_template" in str(error) else "refused"
            assert str(error).startswith("the chat template "), error
            assert "\n" not in str(error) and len(str(error)) < 600, error
            return what
        finally:
            taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            assert taken < ROOM, f"{taken:,} bytes of memory"
        assert isinstance(found[0], str)
        return "read"
