# SPDX-License-Identifier: Apache-2.0
"""What tuning has cost of what the base knew: general text, before and after.

Two numbers, in nats per token of a probe of general text. The rise of the cross-entropy says what was lost: how much worse
the tuned model predicts text that has nothing to do with its task. The KL divergence from the base says how far it has
moved, to the better too (Kalajdzievski 2024, https://arxiv.org/abs/2401.05605, measures forgetting by the cross-entropy
with the base's predictions, which is this and the base's own entropy).

The base is asked once, before the first step, and its likeliest tokens at each position are kept. The KL is that over
these tokens and all others together as one, so that no second model is needed afterwards; it is never more than the KL
over all tokens.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import examples, readers
from jft.evals import intervals, likelihood, result

LIKELIEST = 64  # tokens of the base that are kept at each position
# Rise of the cross-entropy in nats per token up to which the words hold. For comparison: LoRA on 3B models cost 0.03 to
# 0.05, and quantising an 8B model to three bits costs 0.06 (llama.cpp's IQ3_M and Q3_K_M); 0.2 is 22 % more perplexity.
LEVELS = ((0.02, "nothing that shows"), (0.06, "a little"), (0.2, "some"), (1.0, "much"))
BEYOND = "nearly everything"
ALARM = 0.2

Asked = Callable[[likelihood.Batch], tuple[Any, Any, Any]]  # see `program.likeliest`
Compared = Callable[[likelihood.Batch, Any], tuple[Any, Any]]  # see `program.of_ids`


@dataclasses.dataclass(frozen=True)
class Probe:
    """Texts in batches; `kinds` names the kind of each text."""

    texts: likelihood.Texts
    kinds: tuple[str, ...]
    batches: tuple[tuple[likelihood.Batch, likelihood.Places], ...]


@dataclasses.dataclass(frozen=True)
class Base:
    """What the base says of a probe: nats of each text, and per batch values and ids [B, T, K] of its likeliest tokens."""

    nats: np.ndarray
    values: tuple[np.ndarray, ...]
    ids: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """The tuned model beside its base.

    Attributes:
      base, tuned: cross-entropy in nats per token, over the probe's texts.
      rise: of the cross-entropy, with its interval.
      kl: from the base.
      by_kind: the rise on each kind of text.
      level: in a word, see `LEVELS`.
      text: all of it in words.
    """

    base: result.Result
    tuned: result.Result
    rise: intervals.Difference
    kl: result.Result
    by_kind: dict[str, float]
    level: str
    text: str

    def alarm(self, threshold: float = ALARM) -> bool:
        """More was lost than `threshold` nats per token, beyond chance."""
        return self.rise.value > threshold and self.rise.low > 0


def shipped() -> tuple[list[str], list[str]]:
    """The probe that comes with the package: texts and their kinds."""
    text = pathlib.Path(__file__).with_name("probe.txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^=== (\w+)\n", text, flags=re.MULTILINE)
    return [part.strip() for part in parts[1::2]], parts[0::2]


def read(source: str) -> tuple[list[str], list[str]]:
    """A user's own texts: rows of a source with a column `text`, or a text file, of which each part between blank lines.

    Raises:
      UserError: it cannot be read, or has no text.
    """
    found = []
    for row in readers.stream(source):
        if isinstance(row, examples.Fault):
            raise errors.UserError(row.message)
        text = row.value.get("text") if isinstance(row.value, dict) else None
        if not isinstance(text, str):
            raise errors.UserError(f"{row.path}: row {row.number} has no text in a column `text`")
        whole = row.path.split(".")[-1] != "txt"
        found += [text] if whole else re.split(r"\n\s*\n", text)
    found = [text.strip() for text in found if text.strip()]
    if not found:
        raise errors.UserError(f"{source}: no text to judge forgetting by")
    return found, ["text"] * len(found)


def probe(
    tokenizer: Any, source: str = "", *, length: int = 512, batch_size: int = 0, tokens: int = 0
) -> Probe:
    """The probe of the package, or of a user's source, for one tokenizer.

    Args:
      tokenizer: the model's.
      source: a file, a folder or a Hub data set; "" = the package's own.
      length: positions in a row of a batch.
      batch_size: rows; 0 = about 512 tokens.
      tokens: of all texts together, about: the beginning of each; 0 = all, some 11,000 of the package's own.
    """
    some, kinds = read(source) if source else shipped()
    texts = likelihood.texts(tokenizer, some, length, tokens=tokens)
    made = likelihood.batches(texts.requests, batch_size=batch_size, length=length)
    return Probe(texts, tuple(kinds), tuple(made))


def of_base(asked: Asked, some: Probe) -> Base:
    """The base's answers; `asked` is `program.reader(c, partial(program.likeliest, LIKELIEST))` with its parameters."""
    nats, values, ids = np.zeros(len(some.texts.requests)), [], []
    for batch, places in some.batches:
        own, top_values, top_ids = (np.asarray(x) for x in asked(batch))
        _add(nats, -own, places)
        values.append(top_values)
        ids.append(top_ids)
    return Base(some.texts.total(nats), tuple(values), tuple(ids))


def of_tuned(compared: Compared, some: Probe, base: Base) -> Forgetting:
    """The tuned model beside the base; `compared` is `program.reader(c, program.of_ids)` with its parameters."""
    nats, moved = np.zeros((2, len(some.texts.requests)))
    for (batch, places), values, ids in zip(some.batches, base.values, base.ids, strict=True):
        own, now = (np.asarray(x) for x in compared(batch, ids))
        _add(nats, -own, places)
        _add(moved, divergence(values, now), places)
    tokens, total = some.texts.tokens, some.texts.total
    about: dict[str, Any] = {"unit": "nats", "better": -1}
    before = result.ratio("cross_entropy", base.nats, tokens, **about)
    after = result.ratio("cross_entropy", total(nats), tokens, **about)
    kl = result.ratio("kl", total(moved), tokens, **about)
    rise = intervals.difference(before, after)
    by_kind = _by_kind(some.kinds, after.parts[:, 0] - before.parts[:, 0], tokens)
    return Forgetting(before, after, rise, kl, by_kind, *_told(rise, kl, by_kind))


def _add(to: np.ndarray, values: np.ndarray, places: likelihood.Places) -> None:
    for i, (row, span) in places.items():
        to[i] += values[row, span].sum(dtype=np.float64)


def divergence(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """KL(base || tuned) in nats over the given tokens and all others as one.

    Args:
      base, tuned: log-probabilities of the same tokens, [..., K].
    """
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    inside = (np.exp(base) * (base - tuned)).sum(axis=-1)
    # What is left may be nothing but rounding: float32 tells 1e-7 of a sum of one.
    rest, now = (np.maximum(1 - np.exp(x).sum(axis=-1), 1e-7) for x in (base, tuned))
    return np.maximum(inside + rest * np.log(rest / now), 0)


def _by_kind(kinds: Sequence[str], rise: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for kind, nats, count in zip(kinds, rise, tokens, strict=True):
        sums[kind] += (nats, count)
    return {kind: float(nats / count) for kind, (nats, count) in sums.items() if count}


def level(rise: float) -> str:
    """What a rise of the cross-entropy amounts to."""
    return next((word for most, word in LEVELS if rise < most), BEYOND)


def _told(
    rise: intervals.Difference, kl: result.Result, by_kind: dict[str, float]
) -> tuple[str, str]:
    word = level(rise.value) if rise.low > 0 else LEVELS[0][1]
    worst = max(by_kind, key=lambda kind: by_kind[kind])
    most = f", most on {worst} ({by_kind[worst]:+.3f})" if len(by_kind) > 1 else ""
    text = (
        f"forgotten: {word}; cross-entropy of general text {rise.value:+.3f} nats per token"
        f" ({rise.low:+.3f} to {rise.high:+.3f}){most}; KL from the base {kl.value:.3f}"
    )
    return word, text
