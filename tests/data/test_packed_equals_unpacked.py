# SPDX-License-Identifier: Apache-2.0
"""Packed equals unpacked: each token of an example has the log-probability that it has when the example is alone.

Alone means at the start of a row of its own, computed without segments or positions: what follows an example can't reach
back to it, and nothing of the packed batch is in it.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import step
from jft.data import batches, rows
from jft.models import architecture, decoder, hf

FAMILIES = pathlib.Path(__file__).parents[1] / "goldens" / "families"
# Positions that rows take: one trained token alone, the window of 6 and its neighbours, and rows that fill most of one of
# the batch.
LENGTHS = (1, 2, 5, 6, 7, 13, 29, 60)
COUNTS = (6, 5, 4, 3, 3, 4, 3, 2)
WIDTH = 64
# In float64 rows differ by the order of sums; in float32 by 2e-6 at most on these models.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def words(shared: pathlib.Path) -> np.ndarray:
    """Real text as the ids of stories260K."""
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:6000]
    tokenizer = hf.tokenizer(shared / "stories260K" / "hf")
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)


def cut(ids: np.ndarray, limit: int) -> rows.InMemory:
    """Rows of the lengths up to a limit, each from another place; one token or half of them are trained."""
    made = []
    lengths = np.repeat(LENGTHS, COUNTS)
    for i, n in enumerate(lengths[lengths <= limit].tolist()):
        start = 131 * i % (len(ids) - n)
        trained = np.arange(n + 1) >= (n if i % 2 else (n + 1) // 2)
        made.append(rows.Row(ids[start : start + n + 1], trained, f"row {i}"))
    return rows.InMemory(made)


def logprobs(
    c: architecture.Config, params: Any, targets: np.ndarray, *inputs: np.ndarray
) -> np.ndarray:
    """[B, T] of the targets."""
    logits_BTV = np.asarray(jax.jit(functools.partial(decoder.apply, c))(params, *inputs))
    logits_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
    return np.take_along_axis(logits_BTV, targets[..., None], -1)[..., 0] - log_sum_BT


def logprobs_alone(c: architecture.Config, params: Any, given: rows.InMemory) -> list[np.ndarray]:
    tokens, targets = (np.zeros((len(given), max(given.lengths)), np.int32) for _ in range(2))
    for i, n in enumerate(given.lengths):
        tokens[i, :n], targets[i, :n] = given[i].tokens[:-1], given[i].tokens[1:]
    found = logprobs(c, params, targets, tokens)
    return [found[i, :n] for i, n in enumerate(given.lengths)]


def logprobs_packed(
    c: architecture.Config, params: Any, made: batches.Batches
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, log-probability of each of its tokens) over an epoch."""
    steps = [made.batch(number) for number in range(made.steps_per_epoch)]
    batch = {name: np.concatenate([part[name] for part in steps]) for name in steps[0]}
    names = ("targets", "tokens", "positions", "segments")
    found = logprobs(c, params, *(batch[name] for name in names))
    members = [held for number in range(made.steps_per_epoch) for held in made.members(number)]
    for b, held in enumerate(members):
        for segment, (_, row) in enumerate(held, start=1):
            yield row, found[b][batch["segments"][b] == segment]


def check(folder: pathlib.Path, ids: np.ndarray, dtype: str) -> None:
    c, params, _ = hf.load(folder, dtype)
    params = jax.tree.map(jnp.asarray, params)
    given = cut(ids % c.vocab_size, c.max_length)
    alone = logprobs_alone(c, params, given)
    made = batches.Batches([given], batch_size=2, length=WIDTH, seed=0)
    assert made.steps_per_epoch * 2 < len(given) / 4 and made.padding < 0.2, "little is packed"
    packed = list(logprobs_packed(c, params, made))
    assert sorted(row for row, _ in packed) == list(range(len(given)))
    for row, got in packed:
        assert got.dtype == dtype
        np.testing.assert_allclose(got, alone[row], rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture
def random_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**20, 6000).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_stories(shared: pathlib.Path, dtype: str, request: pytest.FixtureRequest) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
        request.getfixturevalue("quick_compiles")
    check(shared / "stories260K" / "hf", words(shared), dtype)


def test_tiny(tiny_model: pathlib.Path, random_ids: np.ndarray) -> None:
    check(tiny_model, random_ids, "float32")


# Windows in some layers and in all, experts with attention sinks, and learned positions, which have to restart.
@pytest.mark.parametrize("case", ["gemma3", "mistral", "gpt_oss", "gpt2"])
def test_families(case: str, random_ids: np.ndarray, x64: None, quick_compiles: None) -> None:
    windows = {layer.window for layer in hf.read_config(FAMILIES / case).pattern} - {None}
    assert case == "gpt2" or 6 in windows
    check(FAMILIES / case, random_ids, "float64")


def test_the_loss_of_a_set_is_the_same_in_packed_and_in_narrow_batches(
    tiny_model: pathlib.Path, random_ids: np.ndarray, x64: None, quick_compiles: None
) -> None:
    c, params, _ = hf.load(tiny_model, "float64")
    given = cut(random_ids % c.vocab_size, WIDTH)
    evaluate = step.eval_step(step.full_loss(c))
    totals = []
    for packing in (True, False):
        parts = batches.evaluation(given, batch_size=4, length=WIDTH, packing=packing)
        sums = np.array([[float(x) for x in evaluate(params, {}, batch)] for batch in parts])
        assert sums[:, 1].min() > 0
        totals.append(sums.sum(axis=0))
    assert totals[0][1] == totals[1][1] == given.trained.sum() > 0
    np.testing.assert_allclose(totals[0][0], totals[1][0], rtol=1e-12)
