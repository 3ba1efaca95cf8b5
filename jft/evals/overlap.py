# SPDX-License-Identifier: Apache-2.0
"""ROUGE, BLEU and chrF, as their reference libraries give them.

ROUGE is rouge-score's, without its stemmer, and the mean over examples. BLEU and chrF are sacrebleu's with its defaults
(13a tokens, exponential smoothing; character n-grams up to 6, beta 2) of the whole corpus; an example's own value is the
sentence's score.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jft import errors
from jft.evals import matching, result

CHARACTERS, BETA = 6, 2  # of chrF
WORDS = 4  # of BLEU


def rouge(kind: str) -> Callable[[matching.Answers], result.Result]:
    """F-measure of `kind`: "rouge1", "rouge2" or "rougeL".

    rouge-score knows words of a-z and 0-9 only. When measured, raises UserError for a reference that has none of them.
    """

    def measure(answers: matching.Answers) -> result.Result:
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer([kind], use_stemmer=False)
        for a in answers:
            if a.reference.strip() and not any(c.isascii() and c.isalnum() for c in a.reference):
                raise errors.UserError(
                    f"score {kind}: ROUGE reads a-z and 0-9 only, and a reference has none: {a.reference[:60]!r};"
                    " use chrf"
                )
        values = [scorer.score(a.reference, a.text)[kind].fmeasure for a in answers]
        return result.mean(kind.replace("rouge", "rouge_").lower(), values)

    return measure


def bleu(answers: matching.Answers) -> result.Result:
    """sacrebleu's BLEU of the corpus."""
    from sacrebleu import metrics

    metric = metrics.BLEU(effective_order=True)  # only the sentences' own scores differ by it
    each = [metric.sentence_score(a.text, [a.reference]) for a in answers]
    parts = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in each], np.float64)
    details = _signature(metrics.BLEU())
    values = np.array([s.score for s in each])
    parts = parts.reshape(-1, 2 + 2 * WORDS)
    return result.Result("bleu", values, parts, corpus_bleu, "points", details=details)


def _signature(metric: Any) -> dict[str, str]:
    """What papers print beside the score; sacrebleu knows it once it has scored something."""
    metric.corpus_score([""], [[""]])
    return {"signature": str(metric.get_signature())}


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of lengths, matches and n-grams that are added up; exponential smoothing as in sacrebleu."""
    given, wanted = sums[..., 0], sums[..., 1]
    matches, grams = sums[..., 2 : 2 + WORDS], sums[..., 2 + WORDS :]
    zeros = np.cumsum((matches == 0) & (grams > 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The k-th order without a match counts as 1 / 2^k matches.
        precision = np.where(matches > 0, matches, 0.5**zeros) / grams
        score = np.exp(np.log(precision).mean(axis=-1) + np.minimum(1 - wanted / given, 0))
    possible = (matches[..., 0] > 0) & (grams > 0).all(axis=-1)
    return np.where(possible, 100 * score, 0.0)


def chrf(answers: matching.Answers) -> result.Result:
    """sacrebleu's chrF2 of the corpus."""
    from sacrebleu import metrics
    from sacrebleu.metrics import helpers

    grams = functools.partial(helpers.extract_all_char_ngrams, max_order=CHARACTERS)
    parts = np.array([_matches(grams(a.text), grams(a.reference)) for a in answers], np.float64)
    details = _signature(metrics.CHRF())
    parts = parts.reshape(-1, 3 * CHARACTERS)
    return result.Result("chrf", corpus_chrf(parts), parts, corpus_chrf, "points", details=details)


def _matches(given: Any, wanted: Any) -> list[int]:
    """For each order: n-grams given, wanted, in both; none are given where there is none to match."""
    rows = [
        (g.total() if w else 0, w.total(), (g & w).total())
        for g, w in zip(given, wanted, strict=True)
    ]
    return [n for row in rows for n in row]


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
    """chrF of n-grams that are added up: precision and recall are means over the orders that both sides have."""
    given, wanted, both = (sums[..., i::3] for i in range(3))
    there = (given > 0) & (wanted > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision, recall = (
        np.where(there, both / np.maximum(n, 1), 0).sum(axis=-1) / orders for n in (given, wanted)
    )
    weight = BETA**2
    below = weight * precision + recall
    return 100 * np.where(
        below > 0, (1 + weight) * precision * recall / np.where(below > 0, below, 1), 0.0
    )
