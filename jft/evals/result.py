# SPDX-License-Identifier: Apache-2.0
"""What is judged, and what comes out: an `Answer` and a `Result`.

A result keeps each example's part of the score as numbers that are added up before the score is formed: for a mean the
value and a one, for BLEU the n-grams that match and that there are. A resample of the examples then costs one matrix
product, and a corpus's score is never taken for a mean of its sentences'.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Finish = Callable[[np.ndarray], np.ndarray]  # sums [..., K] -> score [...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
      prompt: what was asked.
      reference: the answer that was wanted.
      text: the answer that came.
      tokens: of it, the stop token included.
      stopped: it ended with a stop token; False where the limit of tokens cut it.
    """

    prompt: str
    reference: str
    text: str
    tokens: int = 0
    stopped: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """One score of a set of examples.

    Attributes:
      name: of the score.
      values: [N], each example's own value.
      parts: [N, K], what is added up over examples.
      finish: sums of parts -> the score, for any number of sums at once.
      unit: "share" (0 to 1, shown in %), "points" (0 to 100), or a word such as "tokens" or "nats".
      better: 1 where more is better, -1 where less is, 0 where neither is.
      details: more about it, for JSON.
    """

    name: str
    values: np.ndarray
    parts: np.ndarray
    finish: Finish
    unit: str = "share"
    better: int = 1
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def value(self) -> float:
        """The score of all examples together."""
        return float(self.finish(self.parts.sum(axis=0)))

    def show(self, value: float) -> str:
        """A value of this score for a person."""
        if self.unit == "share":
            return f"{100 * value:.1f} %"
        return f"{value:.1f}" if self.unit == "points" else f"{value:.3g} {self.unit}".strip()


def mean(name: str, values: Sequence[float] | np.ndarray, **about: Any) -> Result:
    """The mean of the examples' values."""
    values = np.asarray(values, np.float64)
    return ratio(name, values, np.ones_like(values), **about)


def ratio(
    name: str,
    above: Sequence[float] | np.ndarray,
    below: Sequence[float] | np.ndarray,
    then: Callable[[np.ndarray], np.ndarray] = np.asarray,
    **about: Any,
) -> Result:
    """`then` of a sum over a sum, as in nats per token; an example's value is `then` of its own ratio."""
    parts = np.stack([np.asarray(x, np.float64) for x in (above, below)], axis=-1)

    def finish(sums: np.ndarray) -> np.ndarray:
        return then(sums[..., 0] / sums[..., 1])

    return Result(name, finish(parts), parts, finish, **about)


def of_text(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> list[Result]:
    """How well texts were predicted: nats per token, perplexity, bits per byte.

    Only the last can be compared between models with different tokenizers.

    Args:
      nats: [N], the negative log-likelihood of each text.
      tokens: [N], predicted in each.
      sizes: [N], bytes in UTF-8 of what was predicted in each.
    """
    bits = np.asarray(nats, np.float64) / np.log(2)
    return [
        ratio("cross_entropy", nats, tokens, unit="nats", better=-1),
        ratio("perplexity", nats, tokens, np.exp, unit="", better=-1),
        ratio("bits_per_byte", bits, sizes, unit="bits", better=-1),
    ]
