# SPDX-License-Identifier: Apache-2.0
"""Secrets and personal data are found by their form, stand-ins are not, and no message shows them."""

import random
import string

import pytest

from jft.data import findings
from jft.data.checks import credentials, found, parts, personal


def told(text: str) -> list[findings.Finding]:
    places = found.Places()
    row = places.add("a.jsonl", 1, valid=False)
    result = []
    for check in (credentials.Credentials(), personal.Personal()):
        check.add(row, text, parts.CONTEXT)
        result += check.told(places)
    return result


def patterns(text: str) -> set[str]:
    return {name for finding in told(text) for name in finding.details["patterns"]}


def random_text(alphabet: str, length: int) -> str:
    return "".join(random.Random(length).choices(alphabet, k=length))


# Put together here, so that no file of this project holds anything in the form of a secret.
LETTERS = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + string.digits
FORMS = {
    "AWS key": ("AK" + "IA", UPPER, 16),
    "GitHub token": ("gh" + "p_", LETTERS, 36),
    "GitLab token": ("gl" + "pat-", LETTERS, 20),
    "API key (sk-)": ("s" + "k-", LETTERS, 48),
    "Hugging Face token": ("h" + "f_", LETTERS, 34),
    "Slack token": ("xo" + "xb-", LETTERS, 40),
    "Google key": ("AI" + "za", LETTERS, 35),
    "Stripe key": ("sk_" + "live_", LETTERS, 24),
    "npm token": ("np" + "m_", LETTERS, 36),
    "signed token (JWT)": ("ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxIn0.", LETTERS, 43),
    "private key": ("-----BEGIN RSA PRIVATE" + " KEY-----\n", LETTERS, 128),
}


@pytest.mark.parametrize("name", FORMS)
def test_secrets_are_found_and_not_shown(name: str) -> None:
    start, alphabet, length = FORMS[name]
    value = random_text(alphabet, length)
    (finding,) = told(f"the key is {start}{value} .")
    assert (finding.kind, set(finding.details["patterns"])) == ("secret", {name})
    assert finding.details["fix"] == "remove"
    assert value[:8] not in repr(finding)
    for stand_in in (
        "x" * length,
        "YOUR" + value[4:],
        "." * length,
        "EXAMPLE" + value[7:],
        "A" * length,
    ):
        assert told(f"the key is {start}{stand_in} .") == []


def test_passwords_in_addresses() -> None:
    assert "password in an address" in patterns("postgres://bob:" + "hunter2kQ@db.acme.io:5432/x")
    for harmless in (
        "ftp://username:password@ftp.example.com",
        "https://user:${TOKEN}@host/x",
        "http://localhost:8080/a@b",
        "see https://a.b/c:d and mail",
        "a task-specific and risk-averse plan of sk-learn",
    ):
        assert told(harmless) == []


PERSONAL = {
    "write to anna.lind@posteo.de today": "e-mail address",
    "call +49 30 901820 or": "telephone number",
    "call (212) 664-7665.": "telephone number",
    "call 212-664-7665": "telephone number",
    "card 4111 1111 1111 1111": "card number",
    "card 5500005555555559": "card number",
    "card 378282246310005": "card number",
    "IBAN DE89 3704 0044 0532 0130 00": "IBAN",
    "IBAN GB82WEST12345698765432": "IBAN",
    "SSN 536-90-4399": "US social security number",
    "from 93.184.216.34 at": "IP address",
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_found_and_not_shown(text: str) -> None:
    (finding,) = told(text)
    assert (finding.kind, set(finding.details["patterns"])) == ("personal_data", {PERSONAL[text]})
    value = next(word for word in text.split() if any(mark in word for mark in "@0123456789"))
    assert value not in repr(finding.message) + repr(finding.details)
    assert "fix" not in finding.details


@pytest.mark.parametrize(
    "text",
    [
        "write to jane@example.com or you@yourcompany.com",
        "git@github.com:a/b.git and logo@2x.png",
        "call 212-555-0143",
        "call 123-456-7890",
        "card 4111 1111 1111 1112",
        "IBAN DE89 3704 0044 0532 0130 01",
        "SSN 000-12-3456 or 666-12-3456",
        "192.168.0.1, 127.0.0.1, 8.8.8.8 and 203.0.113.5",
        "version 12.4.0.17 of it, 999.1.2.3",
        "12500+21000-6300=<<12500+21000-6300=27200>>27,200",
        "from 1990-05-15 to 2001-12-31, 10:30-11:45",
        "0" * 5649,
        "pi is 3.14159265358979 and 1234567890123456",
        "ISBN 978-3-16-148410-0, id 821091117",
        "1-10015132-16",
        "$1,000,000-2,000,000",
    ],
)
def test_other_numbers_are_no_personal_data(text: str) -> None:
    assert told(text) == []


def test_luhn_and_iban_by_brute_force() -> None:
    """Of the ten last digits of a card one checks, and of the hundred check digits of an account one."""
    assert sum(personal.is_card(f"411111111111111{digit}") for digit in range(10)) == 1
    checked = [n for n in range(2, 99) if personal.is_iban(f"DE{n:02d}370400440532013000")]
    assert checked == [89]
