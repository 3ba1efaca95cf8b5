# SPDX-License-Identifier: Apache-2.0
"""Secrets in texts: keys, tokens and passwords, by their forms, by what stands before them, or because they are set here.

What is written down of a run (its command, its configuration, a message) goes through `redacted` first.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "[secret]"

# (name, what must stand in the text, pattern); the group "value" is what could be a stand-in.
FORMS: tuple[tuple[str, tuple[str, ...], str], ...] = (
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

_NAMES = r"token|secret|passw(?:or)?d|passphrase|api_?key|access_?key|private_?key|credentials?|signature|authorization"
_NAMED = re.compile(rf"[\w.-]*(?:{_NAMES})[\w.-]*", re.I)
# Called alike, and none: counts, hashes, and the special tokens of a tokenizer.
_NONE = re.compile(
    r"tokens\b|tokenizer|sha256|token_type|(?:bos|eos|unk|pad|sep|cls|mask|stop|end|start|image|max|per)_token"
)
_ANY = re.compile(
    "|".join(
        (
            *(form.replace("(?P<value>", "(?:") for _, _, form in FORMS[:-1]),
            # All that stands before the @: there may be a token alone, without a colon.
            r"(?P<user>\b[A-Za-z][A-Za-z0-9+.-]{1,20}://)[^\s/@\"'<>]+(?=@)",
            # HF_TOKEN=..., "password": "...", and the parts of a signed address: X-Goog-Signature=..., sig=...
            rf"(?P<key>(?<![\w.-])(?:(?i:{_NAMED.pattern})|sig)(?:\s*=\s*[\"']?|[\"']\s*:\s*[\"']))"
            r"(?!\d+\b)[^\s&\"',;}\])]{6,}",
            r"(?P<scheme>\b[Bb]earer\s+)[\w.~+/=-]{8,}",
        )
    )
)
_SIGNS = re.compile(
    "|".join(
        (
            *(re.escape(mark) for _, marks, _ in FORMS for mark in marks),
            "sig=",
            "earer",
            rf"(?i:{_NAMES})",
        )
    )
)
_LEAST = 8  # characters of a variable's value that is looked for


def redacted(value: Any) -> Any:
    """A value as JSON has them, its texts without secrets."""
    return _redacted(value, _set_here())


def command(arguments: Sequence[str]) -> list[str]:
    """A command's arguments; the one after `--token` is a secret as well."""
    found, known = [], _set_here()
    for before, argument in zip(("", *arguments), arguments, strict=False):
        flag = before.startswith("-") and "=" not in before and not argument.startswith("-")
        name, is_, given = argument.partition("=")
        if flag and _names_secret(before):
            argument = MARK
        elif is_ and given and _names_secret(name):
            argument = f"{name}={MARK}"
        found.append(_redacted(argument, known))
    return found


def _redacted(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MARK)
        return _ANY.sub(_marked, value) if _SIGNS.search(value) else value
    if isinstance(value, Mapping):
        return {key: _of_key(key, item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, known) for item in value]
    return value


def _of_key(key: Any, value: Any, known: Sequence[str]) -> Any:
    named = isinstance(key, str) and isinstance(value, str) and value and _names_secret(key)
    return MARK if named else _redacted(value, known)


def _names_secret(name: str) -> bool:
    last = name.lower().strip("-").rsplit(".", 1)[-1]
    return bool(_NAMED.fullmatch(last)) and not _NONE.search(last)


def _marked(found: re.Match[str]) -> str:
    if found["key"] and _NONE.search(found["key"].lower()):
        return found[0]
    return (found["user"] or found["key"] or found["scheme"] or "") + MARK


def _set_here() -> list[str]:
    """Values of variables of the environment that are called as secrets are, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if _names_secret(name) and len(value) >= _LEAST and not os.path.exists(value)
    }
    return sorted(values, key=len, reverse=True)
