# SPDX-License-Identifier: Apache-2.0
"""Languages of the answers, by py3langid, on a sample that is the same for every order of rows."""

import collections

from jft.data import examples, findings
from jft.data.checks import found

SAMPLE = 5000  # rows whose language is asked for
LETTERS = 60  # a text needs so many, and must be mostly letters, to have a language
READ = 160  # characters read
# Probabilities. Other scripts than Latin are told apart well, and their short texts are less sure.
SURE, SURE_WIDE = 0.97, 0.9
SMALL = 0.05  # of the rows: a language below this is rather an accident


class Languages:
    """Keeps a language for at most SAMPLE rows; of more rows, those with the least hashes."""

    def __init__(self) -> None:
        from py3langid import langid

        self._identify = langid.LanguageIdentifier.from_model_file(
            langid.MODEL_FILE, norm_probs=True
        ).classify
        self._kept: dict[int, tuple[int, str]] = {}  # row: hash and language
        self._bits = 0  # rows whose hash has so many zeros at its end are asked
        self._seen = 0

    def add(self, row: int, example: examples.Example, hash: int) -> None:
        text = _telling(example)
        if not text:
            return
        self._seen += 1
        if hash & ((1 << self._bits) - 1):
            return
        language, probability = self._identify(text)
        sure = probability >= (SURE if text.isascii() else SURE_WIDE)
        self._kept[row] = (hash, language if sure else "")
        while len(self._kept) > SAMPLE:
            self._bits += 1
            mask = (1 << self._bits) - 1
            self._kept = {at: item for at, item in self._kept.items() if not item[0] & mask}

    def told(self, places: found.Places) -> list[findings.Finding]:
        rows: dict[str, list[int]] = collections.defaultdict(list)
        for row, (_, language) in self._kept.items():
            if language:
                rows[language].append(row)
        if len(rows) < 2:
            return []
        total = sum(map(len, rows.values()))
        names = sorted(rows, key=lambda name: (-len(rows[name]), name))
        small = [name for name in names[1:] if len(rows[name]) < SMALL * total]
        told = sorted(row for name in small or names[1:] for row in rows[name])
        shares = ", ".join(f"{name} {len(rows[name]):,}" for name in names[:8])
        of = f"a sample of {total:,}" if self._bits else f"{total:,}"
        return [
            findings.Finding(
                "language",
                "note",
                len(told),
                places.at(told),
                f"{of} rows whose language is clear are in {len(names)} languages: {shares}",
                "look whether the rare ones belong to the task"
                if small
                else "nothing to do if the model shall answer in all of them",
                {
                    "languages": {name: len(rows[name]) for name in names},
                    "sampled": bool(self._bits),
                },
            )
        ]


def _telling(example: examples.Example) -> str:
    """The answer, or else the whole row, if it is prose and long enough; else nothing."""
    if not example.messages:
        return _prose(example.text)
    answer = _prose(example.messages[-1].get("content") or "")
    return answer or _prose("\n".join(turn.get("content") or "" for turn in example.messages))


def _prose(text: str) -> str:
    text = text[:READ]
    letters = sum(map(str.isalpha, text))
    # A character of Chinese or Japanese says as much as a few letters.
    needed = LETTERS if text.isascii() else LETTERS // 2
    return text if letters >= needed and letters + text.count(" ") >= 0.75 * len(text) else ""
