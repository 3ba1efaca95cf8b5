# SPDX-License-Identifier: Apache-2.0
"""Personal data in texts: addresses, telephone and account numbers. What was found is never shown."""

import ipaddress
import re

from jft.data import findings
from jft.data.checks import found

PERSONAL = found.Words(
    "personal_data",
    "warning",
    "with what looks like personal data",
    "make sure that you may train on it, or replace it: a model can be made to recite it",
)

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![\w-])"
)
# Kept for documentation (RFC 2606), and the hosts that examples use.
_NO_HOST = re.compile(
    r"(?:^|\.)(?:example\.\w+|(?:your)?(?:domain|company|email|website|site|host)\.\w+|test\.\w+)$"
    r"|\.(?:test|example|invalid|localhost|local|png|jpg|gif|svg|py|js|css|html?|json)$",
    re.I,
)
_NO_USER = re.compile(
    r"^(?:git|noreply|no-reply|user|username|name|you|your.?name|your.?email|email)@", re.I
)
# One search for all that is made of digits; what it is, is settled afterwards. A pattern that begins
# with a set of characters, and not with \b, is searched for several times as fast.
_DIGITS = re.compile(r"[\d+(][\d ().-]{6,26}\d(?![\w%/-]|[.,]\d)")
_NOT_BEFORE = re.compile(r"[\w.,$£€#/+(-]")
_SSN = re.compile(r"(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}")
_AMERICAN = re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d([ .-]))[2-9]\d\d[ .-]\d{4}")
_INTERNATIONAL = re.compile(
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,5}"
)
_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")
_VERSION = re.compile(r"(?:version|v|release|build|section|chapter)[ .]?$", re.I)
_CARD = re.compile(
    r"(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|3[47]\d\d|6011|65\d\d|35\d\d)(?:[ -]?\d){9,15}"
)
_CARD_LENGTHS = {
    "4": (16, 19),
    "5": (16,),
    "2": (16,),
    "34": (15,),
    "37": (15,),
    "6": (16, 19),
    "35": (16, 19),
}
_IBAN = re.compile(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15), **dict.fromkeys(("BE",), 16), **dict.fromkeys(("DK", "FI", "NL"), 18),
    **dict.fromkeys(("SI", "MK"), 19), **dict.fromkeys(("AT", "EE", "LT", "LU", "KZ", "BA"), 20),
    **dict.fromkeys(("CH", "HR", "LV", "LI"), 21),
    **dict.fromkeys(("BG", "DE", "GB", "GE", "IE", "ME", "RS", "BH", "CR"), 22),
    **dict.fromkeys(("AE", "IL"), 23), **dict.fromkeys(("CZ", "ES", "PK", "RO", "SA", "SE", "SK", "TN", "AD"), 24),
    **dict.fromkeys(("PT",), 25), **dict.fromkeys(("IS", "TR"), 26), **dict.fromkeys(("FR", "GR", "IT", "MC", "SM"), 27),
    **dict.fromkeys(("AL", "CY", "DO", "GT", "HU", "LB", "PL", "AZ"), 28), **dict.fromkeys(("BR", "EG", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU"), 30), **dict.fromkeys(("MT",), 31),
}  # fmt: skip
# Names' servers that everybody knows.
_PUBLIC = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"}


class Personal:
    def __init__(self) -> None:
        self._found = found.Found()

    def add(self, row: int, text: str, part: str) -> None:
        if "@" in text and any(is_mail(match) for match in _EMAIL.finditer(text)):
            self._found.add(row, "e-mail address", part)
        for match in _DIGITS.finditer(text):
            before = text[max(match.start() - 12, 0) : match.start()]
            if not _NOT_BEFORE.match(before[-1:]) and (name := number(match.group(), before)):
                self._found.add(row, name, part)
        for match in _IBAN.finditer(text):
            if is_iban(match.group()) and not text[: match.start()][-1:].isalnum():
                self._found.add(row, "IBAN", part)

    def told(self, places: found.Places) -> list[findings.Finding]:
        return found.tell(PERSONAL, self._found, places)


def is_mail(match: re.Match[str]) -> bool:
    return not _NO_HOST.search(match[1]) and not _NO_USER.search(match[0])


def number(text: str, before: str = "") -> str:
    """What personal number this is, "" if none."""
    if _ADDRESS.fullmatch(text):
        return "IP address" if is_public(text) and not _VERSION.search(before) else ""
    if _SSN.fullmatch(text):
        return "US social security number"
    if is_card(text):
        return "card number"
    if _AMERICAN.fullmatch(text):
        # 555-0100 to 555-0199 are for films.
        return "" if re.search(r"555[ .-]01\d\d$", text) else "telephone number"
    digits = sum(character.isdigit() for character in text)
    if 9 <= digits <= 13 and _INTERNATIONAL.fullmatch(text):
        return "telephone number"
    return ""


def is_card(text: str) -> bool:
    """A number of a known issuer and length whose last digit checks (Luhn)."""
    if not _CARD.fullmatch(text):
        return False
    digits = [int(character) for character in text if character.isdigit()]
    start = "".join(map(str, digits[:2]))
    lengths = _CARD_LENGTHS.get(start) or _CARD_LENGTHS.get(start[0], ())
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) in lengths and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """An account number of its country's length whose check digits are right (ISO 13616)."""
    plain = text.replace(" ", "")
    if _IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def is_public(text: str) -> bool:
    """An IPv4 address of the internet, neither private nor for documentation."""
    try:
        return text not in _PUBLIC and ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False
