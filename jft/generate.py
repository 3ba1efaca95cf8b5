# SPDX-License-Identifier: Apache-2.0
"""Answers from a model, with an adapter or without: greedy or sampled, streamed or in batches.

Prompts of different lengths are padded on the right and each row keeps its own position; padding never gets into the
cache of keys and values.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jft import errors, lora, models
from jft.data import encoding, tokenising
from jft.models import architecture, decoder, decoding

# Lengths are rounded up to these, so that a chat that grows does not compile anew at every turn.
PROMPT_STEP, CACHE_STEP = 16, 128
# Tokens decoded between two looks at whether all rows have stopped.
STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 = the most likely token.
      top_k: only the k most likely tokens; 0 = all.
      top_p: the smallest set of likeliest tokens with this much probability (https://arxiv.org/abs/1904.09751).
      seed: of the random numbers.
      max_new_tokens: at most, the stop token included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not ok:
                raise errors.UserError(f"{name}={getattr(self, name)}: it must be {want}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token_B", "position_B", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Decoding:
    cache: Any
    token_B: jax.Array  # chosen, not yet seen by the model
    position_B: jax.Array  # of token_B
    key: jax.Array


class Generator:
    """Generates with one model and one adapter; compiled functions are kept between calls.

    Where the parameters are sharded over a mesh, every process makes the same calls and gets all answers.
    """

    def __init__(self, model: models.Model, adapters: lora.Adapters | None = None):
        self.model = model
        self.adapters = dict(adapters or {})
        self.stop = frozenset(encoding.stop_tokens(model.tokenizer))
        everywhere = _everywhere(model.params)
        read = lora.transform(functools.partial(_read, model.config))
        self._prefill = jax.jit(
            functools.partial(_prefill, read, everywhere), static_argnames=("cache", "sampling")
        )
        following = lora.transform(functools.partial(_following, model.config))
        self._advance = jax.jit(
            functools.partial(_advance, following, everywhere),
            static_argnames=("count", "sampling"),
            donate_argnames="state",
        )

    def with_adapters(self, adapters: lora.Adapters) -> "Generator":
        """The same with another adapter; one of equal shapes uses the same compiled programs."""
        other = copy.copy(self)
        other.adapters = dict(adapters)
        return other

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token ids of one answer as they come, without the stop token."""
        state = self._start([prompt], sampling)
        for produced in range(1, sampling.max_new_tokens + 1):
            token = int(state.token_B[0])
            if token in self.stop:
                return
            yield token
            if produced < sampling.max_new_tokens:
                state, _ = self._step(state, 1, sampling)

    def stream_text(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The answer's text in pieces; a character that several tokens make up comes when it is whole."""
        tokens: list[int] = []
        shown = ""
        for token in self.stream(prompt, sampling):
            tokens.append(token)
            text = self.text(tokens)
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if (text := self.text(tokens)) != shown:
            yield text[len(shown) :]

    def batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, width: int = 0
    ) -> list[list[int]]:
        """Token ids of the answers to several prompts at once, stop tokens included where they came.

        `width` pads prompts to at least so many tokens: batches of one width share a compiled program.
        """
        state = self._start(prompts, sampling, width)
        columns = [np.asarray(state.token_B)[:, None]]
        done = np.isin(columns[0], list(self.stop)).any(axis=1)
        left = sampling.max_new_tokens - 1
        while left > 0 and not done.all():
            # Always a whole stride, so that one program does; what is beyond max_new_tokens is dropped below.
            state, tokens_BT = self._step(state, STRIDE, sampling)
            columns.append(np.asarray(tokens_BT))
            done |= np.isin(columns[-1], list(self.stop)).any(axis=1)
            left -= STRIDE
        rows = np.concatenate(columns, axis=1)[:, : sampling.max_new_tokens]
        return [self._until_stop(row) for row in rows]

    def text(self, tokens: Sequence[int]) -> str:
        tokens = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        return self.model.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _until_stop(self, row: np.ndarray) -> list[int]:
        ends = np.flatnonzero(np.isin(row, list(self.stop)))
        return row[: ends[0] + 1 if ends.size else None].tolist()

    def _start(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, width: int = 0
    ) -> _Decoding:
        lengths = np.array([len(p) for p in prompts], np.int32)
        longest, limit = int(lengths.max()), self.model.config.max_length
        if not lengths.all():
            raise errors.UserError("an empty prompt: nothing to continue")
        for i, prompt in enumerate(prompts, 1):
            own = self.model
            tokenising.check_ids(prompt, own.config.vocab_size, own.tokenizer, f"prompt {i}")
        if longest + sampling.max_new_tokens > limit:
            raise errors.UserError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed"
                f" the model's {limit} positions"
            )
        T = _round_up(max(longest, width), PROMPT_STEP)
        tokens_BT = np.zeros((len(prompts), T), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        finished = max(longest, width) + _round_up(sampling.max_new_tokens, STRIDE)
        dtype = self.model.params["embed"]["embedding"].dtype
        empty = functools.partial(
            decoding.init_cache,
            self.model.config,
            len(prompts),
            _round_up(finished, CACHE_STEP),
            dtype,
            length=longest + sampling.max_new_tokens - 1,  # the last token is chosen, not read
        )
        # Parameters may be spread over several processes, whose programs take nothing that lies on devices of one.
        key = np.asarray(jax.random.key_data(jax.random.key(sampling.seed)))
        return self._prefill(
            self.model.params,
            self.adapters,
            tokens_BT,
            lengths,
            key,
            cache=jax.eval_shape(empty),
            sampling=_choice(sampling),
        )

    def _step(self, state: _Decoding, count: int, sampling: Sampling) -> Any:
        return self._advance(
            self.model.params,
            self.adapters,
            state=state,
            count=count,
            sampling=_choice(sampling),
        )


def _everywhere(params: Any) -> Callable[[jax.Array], jax.Array]:
    """Puts an array on all devices of the parameters' mesh, where every process can read it."""
    placed = getattr(params["embed"]["embedding"], "sharding", None)
    if not isinstance(placed, jax.NamedSharding):
        return lambda x: x
    copied = jax.NamedSharding(placed.mesh, jax.P())
    return lambda x: lax.with_sharding_constraint(x, copied)


def _choice(sampling: Sampling) -> Sampling:
    """The part of it that the compiled program depends on."""
    return dataclasses.replace(sampling, seed=0, max_new_tokens=1)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _read(
    c: architecture.Config,
    params: decoder.Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    cache: decoding.Cache,
) -> tuple[jax.Array, decoding.Cache]:
    """Logits_BV after each row's last token, and the cache; rows are padded on the right."""
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    valid_BT = positions_BT < lengths_B[:, None]
    x_BTD, cache = decoding.prefill(c, params, tokens_BT, positions_BT, valid_BT, cache)
    x_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    return decoder.head(c, params, x_BD), cache


def _following(
    c: architecture.Config,
    params: decoder.Params,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: decoding.Cache,
) -> tuple[jax.Array, decoding.Cache]:
    """Logits_BV after one more token per row, and the cache."""
    x_BD, cache = decoding.step(c, params, token_B, position_B, cache)
    return decoder.head(c, params, x_BD, few=True), cache


def _prefill(
    read: Any,
    everywhere: Any,
    params: Any,
    adapters: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    *,
    cache: decoding.Cache,
    sampling: Sampling,
) -> _Decoding:
    """The prompts read and the first token of each answer chosen; `cache` has the shapes, `key` the key's data."""
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    logits_BV, cache = read(params, adapters, tokens_BT, lengths_B, cache)
    key, now = jax.random.split(jax.random.wrap_key_data(key))
    token_B = everywhere(choose(logits_BV, sampling, key=now))
    return _Decoding(cache, token_B, lengths_B, key)


def _advance(
    following: Any,
    everywhere: Any,
    params: Any,
    adapters: Any,
    *,
    state: _Decoding,
    count: int,
    sampling: Sampling,
) -> tuple[_Decoding, jax.Array]:
    """`count` more tokens of each row: [B, count]."""

    def body(d: _Decoding, _: None) -> tuple[_Decoding, jax.Array]:
        # A row that has stopped goes on behind its end, in slots that nobody reads.
        logits_BV, cache = following(params, adapters, d.token_B, d.position_B, d.cache)
        key, now = jax.random.split(d.key)
        token_B = choose(logits_BV, sampling, key=now)
        return _Decoding(cache, token_B, d.position_B + 1, key), token_B

    state, tokens_TB = lax.scan(body, state, length=count)
    return state, everywhere(tokens_TB.T)


def choose(logits_BV: jax.Array, sampling: Sampling, *, key: jax.Array) -> jax.Array:
    """The next token of each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits_BV.shape[-1])
        kth_B1 = lax.top_k(logits_BV, k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        # The least likely token that stays: the last whose predecessors hold less than top_p.
        last_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True) - 1
        lowest_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
