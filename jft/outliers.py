# SPDX-License-Identifier: Apache-2.0
"""Answers that do not seem to belong to their prompts, by a model's own losses.

A base model finds an answer likelier after the prompt that it answers than after an empty one. By how much, in nats per
token (the pointwise mutual information of prompt and answer, over the answer's length), tells swapped answers from right
ones where the loss alone does not: a hard answer has a high loss after any prompt.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jft import models
from jft.data import findings, rows
from jft.models import decoder

SHOWN = 20  # smallest gains in the statistics, whatever is named
FEWEST = 20  # answers; of fewer, none can be called unusual
MOST = 0.2  # of the answers may be unusual; see `outlying`
# By measurement, docs/data.md: 60 rows each of five sets with 6 answers swapped, SmolLM2-135M-Instruct.
FAR = 2.5  # robust standard deviations below the median gain
# Tokens of a prompt's end and of an answer's beginning that are looked at: more changes little.
PROMPT, ANSWER = 768, 256
# The part of prompts that has to agree on a token for it to belong to the frame that all have.
_AGREE = 0.9
_CHUNK = 64  # positions whose logits exist at a time
_SHORTEST = 128  # positions of the narrowest batch; wider ones double
_CPU_TOKENS, _TOKENS = 1024, 16384  # in a batch

Place = tuple[str, int]
Progress = Callable[..., Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The longest answer of a row, and all that stands before it."""

    place: Place
    prompt: np.ndarray  # int32 [n]
    answer: np.ndarray  # int32 [m]


class Answers:
    """At most `limit` answers of any number of rows: those of the smallest hashes, so that order does not matter."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, Place, Answer]] = []
        self.seen = 0

    def add(self, row: rows.Row, place: Place) -> None:
        start, end = _longest(row.trained)
        if not start or end == start:  # plain text has no prompt
            return
        self.seen += 1
        digest = hashlib.blake2b(row.tokens.tobytes(), digest_size=8).digest()
        entry = (-int.from_bytes(digest, "big"), place)
        if len(self._heap) < self._limit or entry > self._heap[0][:2]:
            answer = Answer(place, row.tokens[:start], row.tokens[start : min(end, start + ANSWER)])
            push = heapq.heappush if len(self._heap) < self._limit else heapq.heappushpop
            push(self._heap, (*entry, answer))

    def chosen(self) -> list[Answer]:
        """In the order of their rows."""
        return sorted((answer for *_, answer in self._heap), key=lambda answer: answer.place)


def find(
    model: models.Model, answers: Answers, progress: Progress
) -> tuple[findings.Finding | None, dict[str, Any]]:
    """The rows whose prompts do nothing for their answers, and numbers on all that were looked at."""
    chosen = answers.chosen()
    told: dict[str, Any] = {"looked_at": len(chosen), "answers": answers.seen}
    if len(chosen) < FEWEST:
        return None, told
    alone, given = losses(model, chosen, progress)
    gains = alone - given
    told |= {"mean_loss": float(given.mean()), "mean_gain": float(gains.mean())}
    order = [int(i) for i in np.argsort(gains, kind="stable")]
    told["smallest_gains"] = [_described(chosen[i], given[i], gains[i]) for i in order[:SHOWN]]
    unusual = outlying(gains)
    if not unusual.any():
        return None, told
    named = [_described(chosen[i], given[i], gains[i]) for i in order if unusual[i]]
    finding = findings.Finding(
        "outlier",
        "warning",
        len(named),
        tuple(chosen[i].place for i in np.flatnonzero(unusual)),
        f"{len(named):,} of {len(chosen):,} answers looked at (of {answers.seen:,}) are hardly likelier after their"
        f" prompts than after none; worst first: {', '.join(str(e['row']) for e in named[:5])}",
        "look whether each answer belongs to its prompt; hard or very short answers can be right",
        {"worst_first": named},
    )
    return finding, told


def _described(answer: Answer, loss: float, gain: float) -> dict[str, Any]:
    path, row = answer.place
    return {"path": path, "row": row, "loss": round(float(loss), 3), "gain": round(float(gain), 3)}


def losses(
    model: models.Model, chosen: Sequence[Answer], progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Mean nats per token of each answer: after the empty frame that all prompts share, and after its prompt."""
    before, after = frame([answer.prompt for answer in chosen])
    bare = np.r_[before, after]
    if not len(bare):  # a text begins after the end of another
        bare = np.array([model.tokenizer.eos_token_id or 0], np.int32)
    pairs = [(bare, answer.answer) for answer in chosen]
    pairs += [(_shortened(answer.prompt, len(before)), answer.answer) for answer in chosen]
    means = mean_losses(model, pairs, progress)
    return means[: len(chosen)], means[len(chosen) :]


def outlying(gains: np.ndarray) -> np.ndarray:
    """Which answers' gains are too small: nothing at all, or far below the others'; bool [n].

    The distance is robust, in standard deviations that a normal distribution of the same median absolute deviation has.
    Where many prompts do nothing for their answers the model does not understand the task, and none is.
    """
    none = gains <= 0
    if none.mean() > MOST:
        return np.zeros(len(gains), bool)
    below = np.median(gains) - gains
    deviation = 1.4826 * np.median(np.abs(below))
    return none | (below > FAR * deviation)


def frame(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What nearly all prompts begin with and end with: the template's parts, and the set's own."""
    before = _shared(prompts)
    after = _shared([prompt[::-1] for prompt in prompts])[::-1]
    # Prompts that are all the same begin and end with all of themselves.
    short = int(np.quantile([len(prompt) for prompt in prompts], 1 - _AGREE))
    room = max(0, short - len(before))
    return before, after[len(after) - min(len(after), room) :]


def _shared(prompts: Sequence[np.ndarray]) -> np.ndarray:
    shared: list[int] = []
    left = list(prompts)
    while True:
        place = len(shared)
        counts = collections.Counter(int(prompt[place]) for prompt in left if len(prompt) > place)
        token, number = counts.most_common(1)[0] if counts else (0, 0)
        if number < _AGREE * len(prompts):
            return np.array(shared, np.int32)
        shared.append(token)
        left = [prompt for prompt in left if len(prompt) > place and prompt[place] == token]


def _shortened(prompt: np.ndarray, kept: int) -> np.ndarray:
    """A prompt without its middle where it is long; what all begin with stays."""
    if len(prompt) <= PROMPT:
        return prompt
    kept = min(kept, PROMPT // 2)
    return np.r_[prompt[:kept], prompt[len(prompt) - PROMPT + kept :]]


def mean_losses(
    model: models.Model, pairs: Sequence[tuple[np.ndarray, np.ndarray]], progress: Progress
) -> np.ndarray:
    """Mean nats per token of each pair's second part after its first; float64 [len(pairs)]."""
    size = _CPU_TOKENS if jax.default_backend() == "cpu" else _TOKENS
    step = _step(model.config)
    means = np.zeros(len(pairs))
    parts = _parts([len(prompt) + len(answer) - 1 for prompt, answer in pairs], size)
    for width, part in progress(parts, "batches of answers"):
        batch = _batch([pairs[i] for i in part], max(1, size // width), width)
        found_BT = np.asarray(step(model.params, batch), np.float64)
        for b, i in enumerate(part):
            means[i] = found_BT[b].sum() / len(pairs[i][1])
    return means


def _parts(lengths: Sequence[int], size: int) -> list[tuple[int, list[int]]]:
    """(width, pairs) of batches: widths are a few powers of two, so that little is compiled and little is padding."""
    by_width: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        width = _SHORTEST
        while width < length:
            width *= 2
        by_width.setdefault(width, []).append(i)
    return [
        (width, members[at : at + max(1, size // width)])
        for width, members in sorted(by_width.items())
        for at in range(0, len(members), max(1, size // width))
    ]


def _batch(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], count: int, width: int
) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((count, width), np.int32) for name in ("tokens", "targets", "segments")}
    batch["scored"] = np.zeros((count, width), bool)
    for b, (prompt, answer) in enumerate(pairs):
        tokens = np.r_[prompt, answer]
        n = len(tokens) - 1
        batch["tokens"][b, :n], batch["targets"][b, :n] = tokens[:-1], tokens[1:]
        batch["segments"][b, :n] = 1
        batch["scored"][b, len(prompt) - 1 : n] = True
    return batch


@functools.cache
def _step(c: Any) -> Any:
    """Jitted: the losses of a batch's scored targets, 0 elsewhere; logits exist for a chunk of them at a time."""

    @jax.jit
    def step(params: decoder.Params, batch: dict[str, jax.Array]) -> jax.Array:
        x_BTD = decoder.hidden(c, params, batch["tokens"], None, batch["segments"])
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        targets_M, scored_M = jnp.ravel(batch["targets"]), jnp.ravel(batch["scored"])
        order_M = jnp.argsort(~scored_M, stable=True)  # scored positions come first

        def chunk(i: jax.Array, loss_M: jax.Array) -> jax.Array:
            at = lax.dynamic_slice_in_dim(order_M, i * _CHUNK, _CHUNK)
            logits = decoder.head(c, params, x_MD[at])
            picked = jnp.take_along_axis(logits, targets_M[at][:, None], axis=-1)[:, 0]
            return loss_M.at[at].set(jax.nn.logsumexp(logits, axis=-1) - picked)

        chunks = (scored_M.sum() + _CHUNK - 1) // _CHUNK
        loss_M = lax.fori_loop(0, chunks, chunk, jnp.zeros(scored_M.shape, jnp.float32))
        return jnp.where(scored_M, loss_M, 0).reshape(batch["scored"].shape)

    return step


def _longest(trained: np.ndarray) -> tuple[int, int]:
    """Start and end of the longest run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.r_[False, trained, False].astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    widest = int(np.argmax(ends - starts))
    return int(starts[widest]), int(ends[widest])
