# SPDX-License-Identifier: Apache-2.0
"""How sure a score is: bootstrap intervals, and whether a difference is one.

Intervals are bias-corrected and accelerated (BCa: Efron 1987, https://doi.org/10.1080/01621459.1987.10478410): examples
are drawn again, their parts added up and the score formed anew, so that a corpus's score has an interval as a mean has.
A bootstrap of few examples that differ is too sure: of 64 pairs that differ in four, all for one side, it calls a
difference which a coin gives in one case of eight. So a difference is called only where also a randomisation test
(Noreen 1989), exact under chance whatever the score, finds it.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jft import errors
from jft.evals import result

RESAMPLES = 5000
BLOCK = 1 << 22  # numbers drawn at a time

Score = Callable[[Sequence[np.ndarray]], np.ndarray]  # sums of each sample -> value


@dataclasses.dataclass(frozen=True)
class Interval:
    low: float
    high: float
    level: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two results of one score.

    Attributes:
      value: the second's less the first's.
      low, high: its interval.
      p: how often chance alone gives as large a difference.
      verdict: "better", "worse", "more", "less" (where neither is better) or "none".
      text: all of it in words.
    """

    value: float
    low: float
    high: float
    p: float
    verdict: str
    text: str


def interval(one: result.Result, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The interval of a score; of answers that are all right or all wrong, Wilson's, since resamples do not differ."""
    _check(one, level)
    if not np.ptp(one.parts, axis=0).any():
        return Interval(*_without_spread(one, level), level)
    low, high = _bca([one.parts], lambda sums: one.finish(sums[0]), level, seed)
    return Interval(low, high, level)


def difference(
    first: result.Result,
    second: result.Result,
    *,
    paired: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Whether the second differs from the first.

    Args:
      first, second: of the same score, in the same order of examples where `paired`.
      paired: both judge the same examples: what is hard for both cancels, and far smaller differences show.
      level: of the interval; the test's is one less it. For several comparisons of one set, divide what it lacks to 1 by
        their number: 0.99 for five.
      seed: of the resamples.

    Raises:
      UserError: the results are not of one score, or paired and not of equally many examples.
    """
    _check(first, level)
    _check(second, level)
    if first.name != second.name:
        raise errors.UserError(f"{first.name} and {second.name} are no results of one score")
    if paired and len(first) != len(second):
        raise errors.UserError(
            f"{first.name}: {len(first)} and {len(second)} examples can't be paired; give both the same"
        )
    samples = [np.concatenate([first.parts, second.parts], axis=1)] if paired else None
    K = first.parts.shape[1]

    def score(sums: Sequence[np.ndarray]) -> np.ndarray:
        a, b = (sums[0][..., :K], sums[0][..., K:]) if paired else sums
        return second.finish(b) - first.finish(a)

    samples = samples or [first.parts, second.parts]
    low, high = _bca(samples, score, level, seed)
    p = _chance(first, second, paired, seed)
    return _told(first, second, (low, high), p, paired, level)


def _check(one: result.Result, level: float) -> None:
    if not 0 < level < 1:
        raise errors.UserError(f"level={level}: between 0 and 1, as in 0.95")
    if not len(one):
        raise errors.UserError(f"{one.name}: no example")
    if not np.isfinite(one.parts).all():
        raise errors.UserError(f"{one.name}: an example's value is not finite")


def _without_spread(one: result.Result, level: float) -> tuple[float, float]:
    value, n = one.value, len(one)
    if one.unit != "share" or value not in (0.0, 1.0):
        return value, value
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    beyond = z**2 / (n + z**2)
    return (0.0, beyond) if value == 0 else (1 - beyond, 1.0)


def _bca(
    samples: Sequence[np.ndarray], score: Score, level: float, seed: int
) -> tuple[float, float]:
    """The interval's ends; each sample is drawn by itself."""
    rng = np.random.default_rng(seed)
    drawn = [np.concatenate(list(_resampled(x, rng))) for x in samples]
    values = np.asarray(score(drawn), np.float64)
    if np.isnan(values).any():
        values = values[
            ~np.isnan(values)
        ]  # resamples without a score, such as one without any token
    normal = statistics.NormalDist()
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    value = float(score([x.sum(axis=0) for x in samples]))
    # Ties count half: scores of answers that are right or wrong have few values.
    below = ((values < value).mean() + (values <= value).mean()) / 2
    if 0 < below < 1:
        bias, acceleration = normal.inv_cdf(below), _acceleration(samples, score)
        z = bias + np.array([normal.inv_cdf(t) for t in tails])
        with np.errstate(divide="ignore"):
            moved = bias + z / (1 - acceleration * z)
        if np.isfinite(moved).all() and (np.abs(acceleration * z) < 1).all():
            tails = np.array([normal.cdf(m) for m in moved])
    low, high = np.quantile(values, tails)
    return float(low), float(high)


def _resampled(parts: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Sums over resamples, [RESAMPLES, K] in blocks."""
    N = len(parts)
    step = max(1, BLOCK // N)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        at = rng.integers(N, size=(rows, N)) + N * np.arange(rows)[:, None]
        times = np.bincount(at.ravel(), minlength=rows * N).reshape(rows, N)
        yield times.astype(np.float64) @ parts


def _acceleration(samples: Sequence[np.ndarray], score: Score) -> float:
    """How the score's spread grows with the score, from leaving out each example in turn."""
    sums = [x.sum(axis=0) for x in samples]
    cubes = squares = 0.0
    for i, x in enumerate(samples):
        N = len(x)
        if N < 2:
            continue
        # The other samples' sums stand for each of this one's rows.
        rest = [np.broadcast_to(s, (N, len(s))) for s in sums]
        rest[i] = sums[i] - x
        values = np.asarray(score(rest), np.float64)
        if not np.isfinite(values).all():
            return 0.0
        pull = (N - 1) * (values.mean() - values)
        cubes += float((pull**3).sum()) / N**3
        squares += float((pull**2).sum()) / N**2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _chance(first: result.Result, second: result.Result, paired: bool, seed: int) -> float:
    """How often the difference is as large when it is left to chance which answer is whose."""
    rng = np.random.default_rng([seed, 1])
    found = abs(second.value - first.value)
    sums, all_parts = first.parts.sum(axis=0), np.concatenate([first.parts, second.parts])
    total, N = all_parts.sum(axis=0), len(all_parts)
    step, extreme = max(1, BLOCK // N), 0
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        if paired:
            swapped = rng.integers(2, size=(rows, len(first))).astype(np.float64)
            own = sums + swapped @ (second.parts - first.parts)
        else:
            chosen = np.zeros((rows, N))
            chosen[:, : len(first)] = 1
            own = rng.permuted(chosen, axis=1) @ all_parts
        apart = np.abs(second.finish(total - own) - first.finish(own))
        # Up to rounding: what chance gives exactly counts as as large.
        extreme += int((apart >= found * (1 - 1e-9) - 1e-12).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def _told(
    first: result.Result,
    second: result.Result,
    ends: tuple[float, float],
    p: float,
    paired: bool,
    level: float,
) -> Difference:
    value, better = second.value - first.value, first.better
    sure = (ends[0] > 0 or ends[1] < 0) and p < 1 - level
    more = value > 0
    words = ("better", "worse") if better else ("more", "less")
    verdict = words[0 if (more == (better >= 0)) else 1] if sure else "none"
    n = (
        f"{len(first)}"
        if paired or len(first) == len(second)
        else f"{len(first)} and {len(second)}"
    )
    count = f"{n} {'same' if paired else 'different'} examples"
    scale, unit = (100, "points") if first.unit == "share" else (1, first.unit)
    change, low, high = (f"{scale * x:+.3g}" for x in (value, *ends))
    told = verdict if sure else "no difference that these examples show"
    text = (
        f"{first.name}: {first.show(first.value)} -> {second.show(second.value)}: {told}"
        f" ({change} {unit}".rstrip()
        + f", {100 * level:g} % interval {low} to {high}, {count}, p = {p:.2g})"
    )
    return Difference(value, *ends, p, verdict, text)
