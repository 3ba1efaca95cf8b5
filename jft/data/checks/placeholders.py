# SPDX-License-Identifier: Apache-2.0
"""Text that stands where other text was meant: template holes, stubs, what models say of themselves.

Braces are common in code, JSON, LaTeX and templates that a row is about, so that a hole must look
like one: a name in braces, in prose.
"""

import re

from jft.data import findings
from jft.data.checks import found, parts

HOLES = found.Words(
    "placeholder",
    "warning",
    "with text that stands for another",
    "fill the holes, or take the rows out (--fix does): the model learns to say them",
    fix="remove",
)
REFUSALS = found.Words(
    "placeholder",
    "note",
    "with an answer that refuses",
    "keep only those that you want: a model that is shown refusals refuses more",
)
UNKNOWN = found.Words(
    "placeholder",
    "note",
    "with a token of another tokenizer's vocabulary as text",
    "put the words back from the source, if you can: the model learns to write the token's name",
)

_FENCE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_DOUBLE = re.compile(
    r"(?<![\w\\^=>$&{\"'])\{\{\s*[a-z][\w .-]{0,40}?\s*\}\}(?![}<\"'\w])", re.I | re.A
)
# Single braces: only the names that templates use.
_NAMES = (
    r"(?:(?:first|last|full|user|your|company|product|customer|client|bot|model|assistant|author)[ _]?)?name|"
    "user|username|author|company|customer|assistant|persona|instruction|input|output|question|query|prompt|"
    "context|answer|response|completion|text|topic|city|date|email|language|document|passage"
)
_SINGLE = re.compile(rf"(?<![\w\\^=>$&{{\"'%#/])\{{(?:{_NAMES})\}}(?![}}<\"'\w(])", re.I | re.A)
# Where a name in braces is code: formatting, templates, shells, markup.
_CODE = re.compile(
    r"\bf['\"]|\.format\(|\bdef |\bprint\(|\breturn |</|\\[a-z]+\{|\bimport |=>|\{%|;\n"
)
_BRACKET = re.compile(
    r"\[(?:your|insert|(?:enter|add) (?:your|the|a|an|name|date|here)|recipient|company|name of|client|customer"
    r"|sender|first name|last name|full name)"
    r"\b[^\]\[\n]{0,40}\](?!\()",
    re.I,
)
_ANGLE = re.compile(r"<(?:insert|your|enter|add)[ _-][^<>\n=/]{1,40}>", re.I)
_TODO = re.compile(
    r"\b(?:TODO|FIXME|TBD)\b\s*[:\n]|^[^\w\n]*(?:TODO|TBD|FIXME|placeholder)[^\w\n]*$", re.M
)
_SELF = re.compile(
    r"\bas an? (?:large |artificial intelligence )?(?:AI|artificial intelligence|language)"
    r"(?: language)? ?(?:model|assistant|chatbot|program|system)?(?:,| I\b| created| developed| trained)"
    r"|\bI(?:'m| am) (?:just |only )?an AI language model\b"
    r"|\bmy (?:knowledge cutoff|training data (?:only )?(?:goes|extends) (?:up )?to)\b"
    r"|\bOpenAI'?s? (?:use.case|content|usage) polic",
    re.I,
)
_REFUSAL = re.compile(
    r"\W*(?:I(?:'m| am) (?:very |really |truly )?sorry|sorry|I apologi[sz]e|unfortunately|my apologies)\b.{0,60}?"
    r"\b(?:I (?:can(?:'|no)t|can not|am (?:not able|unable)|won't|do(?: not|n't) have)|I'm (?:not able|unable)|I must decline)"
    r"|\W*I (?:can(?:'|no)t|can not|am (?:not able|unable) to|won't) (?:help|assist|fulfil|comply|provide|answer|engage|do that)",
    re.I | re.DOTALL,
)
_UNKNOWN = ("<unk>", "[UNK]")
_MARKED = ("n AI", "anguage model", "rtificial intelligence", "cutoff", "y training data", "OpenAI")
_STUBS = ("TODO", "FIXME", "TBD", "placeholder")


class Placeholders:
    def __init__(self) -> None:
        self._holes, self._refusals, self._unknown = (found.Found() for _ in range(3))

    def add(self, row: int, text: str, part: str) -> None:
        if "{" in text:
            self._add_braces(row, text, part)
        for name in _UNKNOWN:
            if name in text:
                self._unknown.add(row, name, part)
        if part == parts.ANSWER:
            self._add_answer(row, text)

    def _add_braces(self, row: int, text: str, part: str) -> None:
        double = "{{" in text and _DOUBLE.search(text)
        # In a question {name} is mostly the form that an answer shall have.
        single = part == parts.ANSWER and _SINGLE.search(text)
        if not double and not single:
            return
        prose = _without_code(text)
        if _CODE.search(prose):
            return
        if double and _DOUBLE.search(prose):
            self._holes.add(row, "{{name}}", part)
        if single and _SINGLE.search(prose):
            self._holes.add(row, "{name}", part)

    def _add_answer(self, row: int, text: str) -> None:
        if "[" in text and _BRACKET.search(text) and _BRACKET.search(_without_code(text)):
            self._holes.add(row, "[Your Name]", parts.ANSWER)
        if "<" in text and _ANGLE.search(text) and _ANGLE.search(_without_code(text)):
            self._holes.add(row, "<insert ...>", parts.ANSWER)
        if any(mark in text for mark in _STUBS) and _is_stub(_without_code(text)):
            self._holes.add(row, "TODO", parts.ANSWER)
        if "orem ipsum" in text:
            self._holes.add(row, "lorem ipsum", parts.ANSWER)
        if any(mark in text for mark in _MARKED) and _SELF.search(text):
            self._holes.add(row, "as an AI", parts.ANSWER)
        if _REFUSAL.match(text[:200]):
            self._refusals.add(row, "refusal", parts.ANSWER)

    def told(self, places: found.Places) -> list[findings.Finding]:
        told = ((HOLES, self._holes), (REFUSALS, self._refusals), (UNKNOWN, self._unknown))
        return [finding for words, rows in told for finding in found.tell(words, rows, places)]


def _without_code(text: str) -> str:
    return _FENCE.sub(" ", text) if "`" in text else text


def _is_stub(prose: str) -> bool:
    """Whether a note to the writer was left, outside of code."""
    return not _CODE.search(prose) and bool(_TODO.search(prose))
