# SPDX-License-Identifier: Apache-2.0
"""Intervals hold the truth as often as they say, and differences are called when they are there."""

import math
import re

import numpy as np
import pytest

from jft import errors
from jft.evals import intervals, result, scores


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough resamples where many intervals are made."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)


def covered(draw: object, truth: float, times: int) -> float:
    hits = 0
    for seed in range(times):
        found = intervals.interval(result.mean("x", draw(), unit=""), seed=seed)  # type: ignore[operator]
        hits += found.low <= truth <= found.high
    return hits / times


def test_coverage(fewer: None) -> None:
    """Of 300 intervals at 95 %, the standard deviation of the share that hold the truth is 1.3 points.

    Of means of 30 exponential numbers a good bootstrap covers about 93 %.
    """
    rng = np.random.default_rng(3)
    assert 0.91 <= covered(lambda: rng.random(64) < 0.9, 0.9, 300) <= 0.99
    assert 0.88 <= covered(lambda: rng.exponential(size=30), 1.0, 300) <= 0.98


def test_the_ends_are_scipys() -> None:
    """A quantile at 2.5 % of 5,000 draws varies by about 1 % of the interval's width, and the acceleration is exact."""
    from scipy import stats

    x = np.random.default_rng(1).lognormal(size=40)
    got = intervals.interval(result.mean("x", x, unit=""))
    want = stats.bootstrap((x,), np.mean, n_resamples=10_000, method="BCa", rng=2)
    want = want.confidence_interval
    room = 0.05 * (want.high - want.low)
    assert got.low == pytest.approx(want.low, abs=room)
    assert got.high == pytest.approx(want.high, abs=room)
    plain = stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=2)
    assert abs(plain.confidence_interval.high - want.high) > room, "the two methods are told apart"


def test_two_samples_are_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(2)
    x, y = rng.lognormal(size=30), 0.5 + rng.lognormal(size=50)
    first, second = (result.mean("x", v, unit="") for v in (x, y))
    got = intervals.difference(first, second, paired=False)

    def apart(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(b, axis=axis) - np.mean(a, axis=axis)

    want = stats.bootstrap((x, y), apart, n_resamples=10_000, method="BCa", rng=2, vectorized=True)
    want = want.confidence_interval
    room = 0.05 * (want.high - want.low)
    assert got.low == pytest.approx(want.low, abs=room)
    assert got.high == pytest.approx(want.high, abs=room)


def test_pairs_show_what_strangers_hide() -> None:
    """One half point more on every example, whose own values spread over tens of points."""
    rng = np.random.default_rng(4)
    hard = rng.normal(50, 20, size=60)
    first = result.mean("x", hard, unit="points")
    second = result.mean("x", hard + rng.normal(0.5, 0.5, size=60), unit="points")
    paired = intervals.difference(first, second)
    apart = intervals.difference(first, second, paired=False)
    assert paired.verdict == "better" and paired.low > 0
    assert apart.verdict == "none" and apart.low < 0 < apart.high
    assert intervals.difference(second, first).verdict == "worse"


def test_few_pairs_that_differ_are_no_difference() -> None:
    """Of 64, four changed and all for the better: a coin does that twice in 16; six do so in 32 / 1,024."""
    for changed, verdict in ((4, "none"), (6, "better")):
        first, second = np.zeros(64), np.zeros(64)
        second[:changed] = 1
        found = intervals.difference(result.mean("x", first), result.mean("x", second))
        assert found.low > 0, "the bootstrap alone calls both"
        assert found.verdict == verdict
        exact = 2 * 0.5**changed
        # 5,000 draws of a share of `exact`, four standard deviations.
        assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact / 5000))


def test_false_calls(fewer: None) -> None:
    """Two models that are equally good: called in 5 % of cases at most (150 of them, three deviations more)."""
    rng = np.random.default_rng(5)
    calls = 0
    for seed in range(150):
        hard = rng.random(50)
        one, other = (result.mean("x", rng.random(50) < hard) for _ in range(2))
        calls += intervals.difference(one, other, seed=seed).verdict != "none"
    assert calls / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_a_corpus_score_is_resampled_over_its_sentences() -> None:
    """Against sacrebleu's own score of corpora drawn with repetition."""
    import sacrebleu

    rng = np.random.default_rng(6)
    words = np.array("the a cat dog sat on ran mat to fro".split())
    references = [" ".join(rng.choice(words, 8)) for _ in range(40)]
    texts = [" ".join(w if rng.random() < 0.8 else "x" for w in r.split()) for r in references]
    answers = [result.Answer("", r, t) for r, t in zip(references, texts, strict=True)]
    got = intervals.interval(scores.measure("bleu", answers))
    drawn = []
    for _ in range(200):
        at = rng.integers(40, size=40)
        some = [texts[i] for i in at], [[references[i] for i in at]]
        drawn.append(sacrebleu.corpus_bleu(*some).score)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # 200 draws place the ends within about a sixth of the width.
    assert got.low == pytest.approx(low, abs=(high - low) / 4)
    assert got.high == pytest.approx(high, abs=(high - low) / 4)
    means = [x for a in answers for x in scores.measure("bleu", [a]).values]
    assert abs(np.mean(means) - scores.measure("bleu", answers).value) > 1, "no mean of sentences"


def test_all_right_is_not_certain() -> None:
    """Wilson's interval, https://doi.org/10.1080/01621459.1927.10502953: 64 of 64 leaves 5.7 % open."""
    found = intervals.interval(result.mean("x", np.ones(64)))
    z = 1.959964
    assert found.high == 1 and found.low == pytest.approx(64 / (64 + z**2))
    assert intervals.interval(result.mean("x", np.zeros(64))).high == pytest.approx(1 - found.low)
    same = intervals.difference(result.mean("x", np.ones(64)), result.mean("x", np.ones(64)))
    assert same.verdict == "none" and same.value == 0


def test_words_and_refusals() -> None:
    first, second = (result.mean("x", np.arange(40) < n) for n in (10, 30))
    found = intervals.difference(first, second)
    assert re.match(r"x: 25.0 % -> 75.0 %: better \(\+50 points, 95 % interval \+\d", found.text)
    lengths = [result.mean("length", [n] * 20, unit="tokens", better=0) for n in (5, 9)]
    assert intervals.difference(*lengths).verdict == "more"
    shorter = [result.mean("loss", [n] * 20, unit="nats", better=-1) for n in (2.0, 1.0)]
    assert intervals.difference(*shorter).verdict == "better"
    with pytest.raises(errors.UserError, match="40 and 20 examples"):
        intervals.difference(first, result.mean("x", np.ones(20)))
    with pytest.raises(errors.UserError, match="no results of one score"):
        intervals.difference(first, result.mean("y", np.ones(40)))
    with pytest.raises(errors.UserError, match="not finite"):
        intervals.interval(result.mean("x", [1.0, np.nan]))


def test_the_seed_decides() -> None:
    one = result.mean("x", np.random.default_rng(0).random(50), unit="")
    first, again, other = (intervals.interval(one, seed=s) for s in (1, 1, 2))
    assert first == again != other
