# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds given continuations: multiple choice, last words, texts.

Functions of a callable `logprobs(batch) -> (log-probability of each target, whether it is the likeliest)`, two arrays
[B, T]; `program.reader(c, program.of_targets)` with a model's parameters is one. Several requests share a row of a batch,
apart by segment, so that all batches have one shape and little of them is padding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import encoding, packing

Batch = dict[str, np.ndarray]
LogProbs = Callable[[Batch], tuple[Any, Any]]
CPU_TOKENS = 512  # in one batch, where nothing else is asked for
STEP = 64  # rows are as long as the longest request, rounded up to this


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens, and from where on they are judged: `start` is at least 1, since the first has nothing before it."""

    tokens: tuple[int, ...]
    start: int

    @property
    def judged(self) -> int:
        return len(self.tokens) - self.start


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one request.

    Attributes:
      logprob: natural logarithm of the probability of all judged tokens together.
      tokens: judged.
      greedy: each is the likeliest where it stands.
    """

    logprob: float
    tokens: int
    greedy: bool


def requests(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """The tokens of contexts and their continuations, split as the LM evaluation harness does.

    A text is tokenised whole, so that it has the tokens of a text that was read; spaces at the context's end belong to the
    continuation. Without a context the tokenizer's first token (BOS, or else its end token) stands before.

    Raises:
      UserError: a continuation is empty, or a text cannot be tokenised.
    """
    for i, (_, continuation) in enumerate(pairs, 1):
        if not continuation:
            raise errors.UserError(f"text {i}: an empty continuation has no likelihood")
    wholes = _tokens(tokenizer, [context + continuation for context, continuation in pairs])
    before = _tokens(tokenizer, [context.rstrip() for context, _ in pairs])
    contexts = [context.strip() for context, _ in pairs]
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    found = []
    for context, whole, start in zip(contexts, wholes, map(len, before), strict=True):
        if not context:
            whole, start = ([] if whole[:1] == [first] else [first]) + whole, 1
        # A tokenizer may join the context's last character with the continuation's first: it judges the token of both.
        found.append(Request(tuple(whole), max(1, min(start, len(whole) - 1))))
    return found


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found = []
    for ids in encoding.plain_tokens(tokenizer, texts):
        if isinstance(ids, errors.UserError):
            raise ids
        found.append(ids.tolist())
    return found


@dataclasses.dataclass(frozen=True)
class Texts:
    """Whole texts to judge, each as one request or, where it is long, several.

    Attributes:
      requests: of all texts.
      owner: [requests], the text that each is a part of.
      sizes: [N], bytes in UTF-8 of what is judged of each text.
    """

    requests: list[Request]
    owner: np.ndarray
    sizes: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[N], judged of each text."""
        return self.total([r.judged for r in self.requests])

    def total(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """[N], the sum over each text's requests."""
        return np.bincount(self.owner, weights=values, minlength=len(self.sizes))


def texts(tokenizer: Any, some: Sequence[str], length: int, *, tokens: int = 0) -> Texts:
    """Texts in windows of `length` positions, see `windows`.

    A text's own first token is judged only where the tokenizer puts BOS before it: nothing says how likely texts begin so.

    Args:
      tokenizer: the model's.
      some: the texts.
      length: of a window, at most.
      tokens: of all texts together, about; each keeps the same share, its beginning. 0 = all.

    Raises:
      UserError: no text has two tokens.
    """
    ids = _tokens(tokenizer, some)
    share = min(1.0, tokens / max(1, sum(map(len, ids)))) if tokens else 1.0
    requests, owner, sizes = [], [], np.zeros(len(some))
    for i, own in enumerate(ids):
        kept = own[: max(2, round(share * len(own)))]
        parts = windows(kept, length)
        requests += parts
        owner += [i] * len(parts)
        judged = tokenizer.decode(kept[1:], clean_up_tokenization_spaces=False)
        sizes[i] = len(judged.encode())
    if not requests:
        raise errors.UserError(f"none of {len(some)} texts has two tokens")
    return Texts(requests, np.array(owner), sizes)


def windows(ids: Sequence[int], length: int) -> list[Request]:
    """Requests of at most `length` positions that judge each token but the first once.

    A window's first token is the last of the one before; the last window reaches back to be as long as the others, as in
    the LM evaluation harness.
    """
    found = []
    for start in range(0, len(ids) - 1, length):
        end = min(start + length, len(ids) - 1)
        begin = max(0, end - length)
        found.append(Request(tuple(ids[begin : end + 1]), start - begin + 1))
    return found


def measure(
    logprobs: LogProbs, wanted: Sequence[Request], *, batch_size: int = 0, length: int = 0
) -> list[Likelihood]:
    """The likelihood of each request.

    Args:
      logprobs: of the targets of a batch.
      wanted: each of two tokens at least.
      batch_size: rows of a batch; 0 = about 512 tokens.
      length: positions of a row; 0 = what the longest request takes.

    Raises:
      UserError: a request is longer than a row, or has nothing to judge.
    """
    found: list[Likelihood | None] = [None] * len(wanted)
    for batch, places in batches(wanted, batch_size=batch_size, length=length):
        values, greedy = (np.asarray(x) for x in logprobs(batch))
        for i, (row, span) in places.items():
            own = values[row, span].astype(np.float64)
            found[i] = Likelihood(float(own.sum()), own.size, bool(greedy[row, span].all()))
    return found  # type: ignore[return-value]


Places = dict[int, tuple[int, slice]]  # of each request in a batch: its row, and where it is judged


def batches(
    wanted: Sequence[Request], *, batch_size: int = 0, length: int = 0
) -> Iterator[tuple[Batch, Places]]:
    """Batches of one shape that hold each request once; see `measure`."""
    if not wanted:
        return
    for i, one in enumerate(wanted, 1):
        if one.start < 1 or one.judged < 1:
            raise errors.UserError(f"request {i}: no token to judge behind the first {one.start}")
    sizes = [len(one.tokens) - 1 for one in wanted]
    length = length or -(-max(sizes) // STEP) * STEP
    if max(sizes) > length:
        raise errors.UserError(
            f"request {int(np.argmax(sizes)) + 1} takes {max(sizes)} positions, a row has {length}; shorten it"
        )
    batch_size = batch_size or max(1, CPU_TOKENS // length)
    bins = packing.pack(sizes, length)
    for first in range(0, len(bins), batch_size):
        held = [bins[b] for b in range(first, min(first + batch_size, len(bins)))]
        yield _batch(wanted, held, batch_size, length)


def _batch(
    wanted: Sequence[Request], held: Sequence[np.ndarray], batch_size: int, length: int
) -> tuple[Batch, Places]:
    names = ("tokens", "targets", "segments", "positions")
    batch: Batch = {name: np.zeros((batch_size, length), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, length), np.float32)
    places: Places = {}
    for row, own in enumerate(held):
        at = 0
        for segment, i in enumerate(own.tolist(), 1):
            tokens, start = wanted[i].tokens, wanted[i].start
            n = len(tokens) - 1
            span = slice(at, at + n)
            batch["tokens"][row, span] = tokens[:-1]
            batch["targets"][row, span] = tokens[1:]
            batch["segments"][row, span] = segment
            batch["positions"][row, span] = np.arange(n)
            places[i] = (row, slice(at + start - 1, at + n))
            batch["weights"][places[i]] = 1
            at += n
    return batch, places
