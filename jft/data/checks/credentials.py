# SPDX-License-Identifier: Apache-2.0
"""Secrets in texts: keys, tokens and passwords of known forms. What was found is never shown."""

import re

from jft.data import findings
from jft.data.checks import found

SECRETS = found.Words(
    "secret",
    "warning",
    "with what looks like a secret",
    "take them out (--fix removes the rows) and revoke what is real: a model can be made to recite it",
    fix="remove",
)

# (name, what must stand in the text, pattern); the group "value" is what could be a stand-in.
_FORMS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("AWS key", ("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)(?P<value>[A-Z0-9]{16})\b"),
    ("GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_(?P<value>[A-Za-z0-9]{36,})\b"),
    ("GitHub token", ("github_pat_",), r"\bgithub_pat_(?P<value>\w{40,})\b"),
    ("GitLab token", ("glpat-",), r"\bglpat-(?P<value>[\w-]{20,})"),
    ("API key (sk-)", ("sk-",), r"\bsk-(?:ant-|proj-|svcacct-|or-)?(?P<value>[A-Za-z0-9_-]{24,})"),
    ("Hugging Face token", ("hf_",), r"\bhf_(?P<value>[A-Za-z0-9]{30,})\b"),
    ("Slack token", ("xox",), r"\bxox[abeoprs]-(?P<value>[A-Za-z0-9-]{20,})"),
    ("Slack address", ("hooks.slack.com",), r"hooks\.slack\.com/services/(?P<value>[A-Z0-9]{8,}/[A-Z0-9]{8,}/\w{20,})"),
    ("Google key", ("AIza",), r"\bAIza(?P<value>[\w-]{35})(?![\w-])"),
    ("Stripe key", ("k_live_",), r"\b[sr]k_live_(?P<value>[A-Za-z0-9]{16,})\b"),
    ("npm token", ("npm_",), r"\bnpm_(?P<value>[A-Za-z0-9]{36})\b"),
    ("PyPI token", ("pypi-AgEI",), r"\bpypi-AgEI(?P<value>[\w-]{50,})"),
    ("SendGrid key", ("SG.",), r"\bSG\.(?P<value>[\w-]{22}\.[\w-]{43})"),
    ("signed token (JWT)", ("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{5,}\.(?P<value>[\w-]{20,})"),
    (
        "private key",
        ("PRIVATE KEY",),
        r"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----[\s\\nr]*(?P<value>[A-Za-z0-9+/=\s\\]{64,})",
    ),
    ("password in an address", ("://",), r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{1,64}:(?P<value>[^\s/@:\"'<>]{3,64})@[\w.-]+"),
)  # fmt: skip
_BY_MARK = tuple((mark, name, re.compile(form)) for name, marks, form in _FORMS for mark in marks)
# What documentation writes in a secret's place.
_STAND_IN = re.compile(
    r"x{4}|\*{3}|\.{3}|0{6}|example|your|here|secret|passw|placeholder|token|dummy|sample|test|changeme|redacted"
    r"|1234567|abcdef|[{}$\[\]()]|^(?:pass|pwd|pw|user|admin|root|key|foo|bar)$",
    re.I,
)


class Credentials:
    def __init__(self) -> None:
        self._found = found.Found()

    def add(self, row: int, text: str, part: str) -> None:
        for mark, name, pattern in _BY_MARK:
            if mark in text and _real(pattern, text):
                self._found.add(row, name, part)

    def told(self, places: found.Places) -> list[findings.Finding]:
        return found.tell(SECRETS, self._found, places)


def _real(pattern: re.Pattern[str], text: str) -> bool:
    return any(not _is_stand_in(match["value"]) for match in pattern.finditer(text))


def _is_stand_in(value: str) -> bool:
    """Long values are random: neither do words stand in them, nor few characters only."""
    return bool(_STAND_IN.search(value)) or (len(value) >= 16 and len(set(value)) < 8)
