# SPDX-License-Identifier: Apache-2.0
"""Keys, tokens and passwords of known forms, and texts without them: none gets into a run's folder or a message."""

import re
from typing import Any

HIDDEN = "***"

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
BY_MARK = tuple((mark, name, re.compile(form)) for name, marks, form in _FORMS for mark in marks)
# What else addresses and commands carry: the key of a signed address, a value named as secret.
_NAMED = re.compile(
    r"(?i)\b(?P<name>x-(?:goog|amz)-(?:signature|credential|security-token)|signature|sig|access_token|token|api_?key"
    r"|password|secret)=(?P<value>[^&\s\"']{6,})"
)


def redacted(value: Any) -> Any:
    """A text, or all texts in lists and dictionaries, with HIDDEN in the place of secrets."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {key: redacted(x) for key, x in value.items()}
    return type(value)(map(redacted, value)) if isinstance(value, list | tuple) else value


def _text(text: str) -> str:
    for mark, _, pattern in BY_MARK:
        if mark in text:
            text = pattern.sub(_hide, text)
    return _NAMED.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    begin, end = (x - match.start() for x in match.span("value"))
    return f"{match[0][:begin]}{HIDDEN}{match[0][end:]}"
