# SPDX-License-Identifier: Apache-2.0
"""Answers that do not belong to their prompts: losses against the model's own logits, and swapped answers found."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jft import generate, models, outliers
from jft.data import rows

pytestmark = pytest.mark.usefixtures("optimised")  # what is saved in compiling is lost in running


def through(items: Any, unit: str, total: int | None = None) -> Any:
    return items


def made(prompt: list[int], answer: list[int]) -> rows.Row:
    trained = np.r_[np.zeros(len(prompt), bool), np.ones(len(answer), bool)]
    return rows.Row(np.array(prompt + answer, np.int32), trained, "")


def random_rows(count: int, seed: int = 0, most: int = 200) -> list[rows.Row]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, (most // 2, most // 2), (count, 2))
    return [made(*(rng.integers(0, 250, n).tolist() for n in pair)) for pair in sizes]


@pytest.fixture(scope="module")
def tiny(tiny_model: pathlib.Path) -> models.Model:
    return models.load(str(tiny_model))


@pytest.mark.parametrize("size", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_losses_are_the_models(tiny: models.Model, size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(outliers, "_CPU_TOKENS", size)
    pairs = []
    for row in random_rows(7, most=250):
        start = int(row.trained.argmax())
        pairs.append((row.tokens[:start], row.tokens[start:]))
    means, apply = outliers.mean_losses(tiny, pairs, through), jax.jit(tiny.apply)
    for mean, (prompt, answer) in zip(means, pairs, strict=True):
        tokens = np.r_[prompt, answer]
        padded = np.zeros((1, 256), np.int32)  # of one shape, and what comes later changes nothing
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(apply(tiny.params, padded), np.float64)[0, : len(tokens) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -log_p[np.arange(len(prompt) - 1, len(tokens) - 1), answer].mean()
        assert mean == pytest.approx(expected, rel=1e-5)


def test_few_shapes_are_compiled(tiny: models.Model) -> None:
    pairs = [(row.tokens[:1], row.tokens[1:]) for row in random_rows(40, most=250)]
    step = outliers._step(tiny.config)  # noqa: SLF001
    step.clear_cache()
    outliers.mean_losses(tiny, pairs, through)
    assert step._cache_size() <= 3  # noqa: SLF001


def test_the_choice_is_by_content() -> None:
    some = random_rows(50)
    places = {row.tokens.tobytes(): (f"{i % 3}.jsonl", i) for i, row in enumerate(some)}
    chosen = []
    for order in (range(50), np.random.default_rng(1).permutation(50)):
        answers = outliers.Answers(12)
        for i in order:
            answers.add(some[int(i)], places[some[int(i)].tokens.tobytes()])
        assert answers.seen == 50
        chosen.append(answers.chosen())
    a, b = ([answer.place for answer in found] for found in chosen)
    assert a == b == sorted(a) and len(set(a)) == 12
    every = outliers.Answers(500)
    for row in some:
        every.add(row, places[row.tokens.tobytes()])
    assert [answer.place for answer in every.chosen()] == sorted(places.values())


def test_the_longest_answer_of_a_conversation_is_taken() -> None:
    tokens = np.arange(20, dtype=np.int32)
    trained = np.isin(tokens, [3, 4, 9, 10, 11, 12, 18, 19])
    answers = outliers.Answers(5)
    answers.add(rows.Row(tokens, trained, ""), ("a", 1))
    answers.add(rows.Row(tokens, np.ones(20, bool), ""), ("a", 2))  # plain text
    answers.add(rows.Row(tokens, np.zeros(20, bool), ""), ("a", 3))  # nothing trained
    (answer,) = answers.chosen()
    assert answer.prompt.tolist() == list(range(9)) and answer.answer.tolist() == [9, 10, 11, 12]


def test_the_frame_is_what_nearly_all_prompts_share() -> None:
    rng = np.random.default_rng(0)
    prompts = [np.r_[1, 2, 3, rng.integers(10, 99, 8), 7, 8].astype(np.int32) for _ in range(30)]
    odd = np.array([5, 5, 5, 5], np.int32)
    before, after = outliers.frame([*prompts, odd])
    assert before.tolist() == [1, 2, 3] and after.tolist() == [7, 8]
    same = [np.array([1, 2, 3, 4], np.int32)] * 30
    before, after = outliers.frame(same)
    assert np.r_[before, after].tolist() == [1, 2, 3, 4]
    before, after = outliers.frame([np.array([i], np.int32) for i in range(30)])
    assert len(before) == len(after) == 0


def test_what_is_outlying() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(1, 0.1, 200)
    gains[[3, 50]] = 0.2, -0.5
    found = np.flatnonzero(outliers.outlying(gains))
    assert {3, 50} <= set(found) and len(found) < 10
    assert not outliers.outlying(np.ones(50)).any()
    assert not outliers.outlying(
        rng.normal(0, 1, 200)
    ).any()  # the model knows nothing of this task


def test_prompts_without_a_frame_are_scored(tiny: models.Model) -> None:
    answers = outliers.Answers(500)
    for i, row in enumerate(random_rows(30)):
        answers.add(row, ("a", i))
    chosen = answers.chosen()
    assert not len(np.r_[outliers.frame([answer.prompt for answer in chosen])])
    alone, given = outliers.losses(tiny, chosen, through)
    eos = np.array([tiny.tokenizer.eos_token_id], np.int32)
    assert alone == pytest.approx(
        outliers.mean_losses(tiny, [(eos, answer.answer) for answer in chosen], through)
    )
    assert np.isfinite(given).all() and not np.allclose(alone, given)


def test_few_answers_are_not_judged(tiny: models.Model) -> None:
    answers = outliers.Answers(500)
    for row in random_rows(outliers.FEWEST - 1):
        answers.add(row, ("a", 1))
    assert outliers.find(tiny, answers, through) == (None, {"looked_at": 19, "answers": 19})


def swapped(pairs: list[Any], count: int, seed: int = 0) -> tuple[list[Any], set[int]]:
    """Pairs of which some have each other's answers, and which those are."""
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    answers = [answer for _, answer in pairs]
    for a, b in zip(chosen, np.roll(chosen, 1), strict=True):
        answers[a] = pairs[b][1]
    found = [(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True)]
    return found, {int(i) for i in chosen}


def test_swapped_ends_of_stories_are_found(shared: pathlib.Path) -> None:
    model = models.load(str(shared / "stories260K" / "hf"))
    begin = model.tokenizer("Once upon a time")["input_ids"]
    sampling = generate.Sampling(temperature=1.0, max_new_tokens=120, seed=3)
    stories = list(generate.Generator(model).batch([begin] * 48, sampling))
    stories = [[*begin, *story] for story in stories if len(story) == 120]
    assert len(stories) >= 40
    pairs, wrong = swapped([(story[:64], story[64:]) for story in stories], 5)
    answers = outliers.Answers(500)
    for i, (prompt, answer) in enumerate(pairs):
        answers.add(made(prompt, answer), ("stories", i))
    finding, told = outliers.find(model, answers, through)
    assert finding is not None and finding.severity == "warning"
    found = {number for _, number in finding.places}
    assert len(found & wrong) >= 4 and len(found - wrong) <= 1, (found, wrong)
    first = [entry["row"] for entry in finding.details["worst_first"]]
    assert set(first) == found and first[0] in wrong
    assert told["looked_at"] == len(pairs) and told["mean_gain"] > 0
    jax.clear_caches()


@pytest.mark.slow
def test_swapped_answers_are_found_by_a_chat_model(
    shared: pathlib.Path, smollm2_gguf: pathlib.Path
) -> None:
    from jft.data import encoding, examples

    model = models.load(str(smollm2_gguf))
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))[:60]
    data = [json.loads(lines[i]) for i in order]
    pairs, wrong = swapped([(row["question"], row["answer"]) for row in data], 6)
    some = [examples.Example(examples.pair(*pair), f"{i}", "a", i) for i, pair in enumerate(pairs)]
    answers = outliers.Answers(500)
    for example, encoded in zip(some, encoding.Encoder(model.tokenizer).encode(some), strict=True):
        assert isinstance(encoded, list)
        answers.add(encoded[0], ("a", example.number))
    finding, told = outliers.find(model, answers, through)
    assert finding is not None
    assert {number for _, number in finding.places} <= wrong
    # Measured: five of the six smallest gains, two of them below zero. Chance would be 0.6 of six.
    assert len({entry["row"] for entry in told["smallest_gains"][:6]} & wrong) >= 5
