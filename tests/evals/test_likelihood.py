# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: against torch's of a small random model, against plain sums, and what is made of them."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import errors, lora, models
from jft.evals import abilities, likelihood, program
from jft.lora import peft
from jft.models import architecture, families, hf


@pytest.fixture(scope="module")
def tiny(goldens: pathlib.Path) -> tuple[architecture.Config, Any, Any]:
    """The golden's model and its adapter, in float32."""
    config, params, _ = hf.load(goldens / "model", "float32")
    params = jax.tree.map(jnp.asarray, params)
    names = families.modules(config)
    adapters = peft.load(goldens / "lora_AB" / "init", names, params, architecture.LAYOUTS)
    return config, params, adapters


LONGEST = 40


@pytest.fixture(scope="module")
def plain(tiny: Any) -> Callable[[likelihood.Request], np.ndarray]:
    """Log-probabilities [judged, V] from all logits of a request alone; what is behind it changes nothing before."""
    config, params, _ = tiny
    apply = jax.jit(models.Model("", config, params, None, "").apply)

    def of(one: likelihood.Request) -> np.ndarray:
        tokens = np.zeros((1, LONGEST), np.int32)
        tokens[0, : len(one.tokens)] = one.tokens
        logprobs = jax.nn.log_softmax(apply(params, tokens)[0], axis=-1)
        return np.asarray(logprobs)[one.start - 1 : len(one.tokens) - 1]

    return of


@pytest.fixture(scope="module")
def run(tiny: Any) -> Any:
    """The program, with chunks that the batches do not fill."""
    return program.reader(tiny[0], program.of_targets, chunk=24)


def some_requests(config: architecture.Config, count: int) -> list[likelihood.Request]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, LONGEST, count)
    tokens = [tuple(rng.integers(3, config.vocab_size, n).tolist()) for n in lengths]
    return [likelihood.Request(t, int(rng.integers(1, len(t)))) for t in tokens]


def test_likelihoods_are_torchs(goldens: pathlib.Path, tiny: Any, run: Any) -> None:
    """The golden's rows, of which each is judged from its fourth token on, in one packed row.

    5e-6 a token is the error of a correct float32 implementation on these logits (see the goldens' README).
    """
    _, params, _ = tiny
    batch = np.load(goldens / "model_batch.npz")
    want = np.load(goldens / "model_out_fp64.npz")
    sizes = batch["attention_mask"][:4].sum(axis=1)
    wanted = [
        likelihood.Request(tuple(row[:n].tolist()), 3)
        for row, n in zip(batch["input_ids"][:4], sizes, strict=True)
    ]
    got = likelihood.measure(functools.partial(run, params, {}), wanted)
    for i, one in enumerate(got):
        nll = want["per_token_nll"][i, 2 : sizes[i] - 1]
        assert one.tokens == len(nll)
        assert one.logprob == pytest.approx(-nll.sum(), abs=5e-6 * len(nll))
        likeliest = want["top16_ids"][i, 2 : sizes[i] - 1, 0]
        assert one.greedy == np.array_equal(likeliest, batch["input_ids"][i, 3 : sizes[i]])


@pytest.mark.parametrize(("batch_size", "length"), [(0, 0), (3, 50)])
def test_packed_requests_are_those_alone(
    tiny: Any, run: Any, plain: Any, batch_size: int, length: int
) -> None:
    config, params, _ = tiny
    wanted = some_requests(config, 23)
    got = likelihood.measure(
        functools.partial(run, params, {}), wanted, batch_size=batch_size, length=length
    )
    for one, found in zip(wanted, got, strict=True):
        logprobs = plain(one)
        own = logprobs[np.arange(one.judged), one.tokens[one.start :]]
        # Sums of float32 in another order.
        assert found.logprob == pytest.approx(own.sum(), abs=2e-5 * one.judged)
        assert found.greedy == (logprobs.argmax(-1) == one.tokens[one.start :]).all()


def test_an_adapter_counts(tiny: Any, run: Any) -> None:
    """Through the transform as in a merged model, and a fresh adapter changes no bit."""
    config, params, adapters = tiny
    wanted = some_requests(config, 9)

    def of(params: Any, adapters: Any) -> np.ndarray:
        found = likelihood.measure(functools.partial(run, params, adapters), wanted)
        return np.array([one.logprob for one in found])

    base, tuned = of(params, {}), of(params, adapters)
    np.testing.assert_allclose(tuned, of(lora.merge(params, adapters).params, {}), atol=1e-4)
    assert np.abs(tuned - base).max() > 0.1
    np.testing.assert_array_equal(of(params, lora.neutral(adapters, params)), base)


def test_logits_exist_for_a_chunk_at_a_time(tiny: Any) -> None:
    config, params, _ = tiny
    batch = next(likelihood.batches(some_requests(config, 40), batch_size=4, length=64))[0]
    run = program.reader(config, program.of_targets, chunk=8)  # only traced
    shapes = str(jax.make_jaxpr(run)(params, {}, batch))
    V = config.vocab_size
    assert f"f32[8,{V}]" in shapes
    assert f"f32[256,{V}]" not in shapes and f"f32[4,64,{V}]" not in shapes


def test_requests_are_split_as_the_harness_does(tiny_model: pathlib.Path) -> None:
    tokenizer = models.load_tokenizer(str(tiny_model))
    pairs = [("the user", " asks"), ("the user ", "asks"), ("", "the user"), ("  ", "the")]
    plain, moved, alone, blank = likelihood.requests(tokenizer, pairs)
    assert plain == moved, "a space at the end of the context is judged with the continuation"
    assert tokenizer.decode(plain.tokens[plain.start :]) == " asks"
    assert alone.tokens[0] == tokenizer.bos_token_id and alone.start == 1
    assert tokenizer.decode(alone.tokens[1:]) == "the user"
    assert tokenizer.decode(blank.tokens[1:]) == "  the" and blank.start == 1
    with pytest.raises(errors.UserError, match="text 2: an empty continuation"):
        likelihood.requests(tokenizer, [("a", "b"), ("a", "")])


def test_texts_are_judged_once_in_windows(tiny_model: pathlib.Path) -> None:
    tokenizer = models.load_tokenizer(str(tiny_model))
    some = ["the user asks the assistant for red green blue", "é", "hello one two three"]
    found = likelihood.texts(tokenizer, some, 4)
    ids = [tokenizer(text)["input_ids"] for text in some]
    assert found.tokens.tolist() == [len(i) - 1 for i in ids]
    for text, own in zip(range(3), ids, strict=True):
        parts = [r for r, i in zip(found.requests, found.owner, strict=True) if i == text]
        assert [t for part in parts for t in part.tokens[part.start :]] == own[1:]
        assert all(len(part.tokens) == 5 for part in parts) or len(own) < 5
    first = [len(tokenizer.decode(i[:1])) for i in ids]
    assert found.sizes[0] == len(some[0]) - first[0]
    half = likelihood.texts(tokenizer, some, 4, tokens=sum(map(len, ids)) // 2)
    for whole, kept in zip(ids, half.tokens, strict=True):
        assert kept == max(1, round(len(whole) / 2) - 1)
    assert half.sizes[0] < found.sizes[0] * 0.6


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    with pytest.raises(errors.UserError, match="request 2 takes 9 positions, a row has 8"):
        likelihood.measure(
            lambda batch: (0, 0),
            [likelihood.Request((1, 2), 1), likelihood.Request(tuple(range(10)), 1)],
            length=8,
        )
    with pytest.raises(errors.UserError, match="request 1: no token to judge"):
        likelihood.measure(lambda batch: (0, 0), [likelihood.Request((1, 2), 2)])
    assert likelihood.measure(lambda batch: (0, 0), []) == []


def found(logprob: float, tokens: int, greedy: bool = False) -> likelihood.Likelihood:
    return likelihood.Likelihood(logprob, tokens, greedy)


def test_choices_are_made_as_the_harness_makes_them() -> None:
    """acc, acc_norm and acc_bytes of lm_eval.api.task: by the sum, per character, per byte of the choice."""
    item = abilities.Item(("q",) * 3, (" ab", " abcdefghij", " ééé"), gold=1)
    # Per character -2, -0.5, -0.9; per byte -2, -0.5, -0.45; per token -4, -2.5, -2.7.
    each = [found(-4.0, 1), found(-5.0, 2), found(-2.7, 1)]
    by_name = {r.name: r.value for r in abilities.judge([item], each)}
    assert by_name == {
        "accuracy": 0.0,
        "accuracy_norm": 1.0,
        "accuracy_bytes": 0.0,
        "accuracy_tokens": 1.0,
    }
    words = [abilities.Item(("a",), (" b",)), abilities.Item(("c",), (" d",))]
    last, perplexity = abilities.judge(words, [found(-1.0, 2, True), found(-3.0, 1)])
    assert last.value == 0.5 and perplexity.value == pytest.approx(np.exp(2))
    both = abilities.judge([item, *words], [*each, found(-1.0, 2, True), found(-3.0, 1)])
    assert [r.name for r in both][-2:] == ["last_word", "word_perplexity"]
    with pytest.raises(errors.UserError, match="no item"):
        abilities.judge([], [])


def test_items_of_three_forms(tmp_path: pathlib.Path) -> None:
    rows = [
        {"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 1},
        {"query": "The man left, so", "choices": ["x", "y"], "gold": 0},
        {"context_options": ["A b", "C b"], "continuation": "ran.", "gold": 0},
        {"context": "One two", "continuation": "three"},
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, told, who, word = abilities.read(str(file))
    assert asked.contexts[0] == "Question: Why?\nAnswer:" and asked.continuations == (" a", " b")
    assert told.contexts[1] == "The man left, so" and asked.gold == 1
    assert who.contexts == ("A b", "C b") and who.continuations == (" ran.", " ran.")
    assert word == abilities.Item(("One two",), (" three",))
    for row, message in (
        ({"query": "x", "choices": ["a"], "gold": 0}, "no list of two"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "write 0 to 1"),
        ({"query": "x", "choices": ["a", "b"], "gold": True}, "gold is True"),
        ({"context": "", "continuation": "b"}, "context is ''"),
        ({"text": "x"}, "has text; wanted are"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(errors.UserError, match=f"item 1.*{message}"):
            abilities.read(str(file))
    file.write_text("{\n")
    with pytest.raises(errors.UserError, match="items.jsonl"):
        abilities.read(str(file))
