# SPDX-License-Identifier: Apache-2.0
"""The adapter of the LM evaluation harness: its requests answered as our own scoring answers them."""

import functools
import pathlib
from typing import Any

import numpy as np
import pytest

from jft import errors, models
from jft.evals import harness, likelihood, program

PAIRS = [("the user asks", " the assistant"), ("red ", "green"), ("", "hello one two")]


def test_without_the_package_its_name_is_told() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(errors.UserError, match="pip install lm-eval"):
            harness.model(None, lambda batch: (0, 0), lambda p, n, t: [], max_length=8)


@pytest.fixture(scope="module")
def parts(tiny_model: pathlib.Path) -> tuple[Any, Any, Any]:
    """The harness's instances, a tokenizer and log-probabilities of a small model."""
    instance = pytest.importorskip(
        "lm_eval.api.instance", reason="lm-eval is not installed: pip install lm-eval"
    )
    model = models.load(str(tiny_model))
    run = program.reader(model.config, program.of_targets)
    return instance.Instance, model.tokenizer, functools.partial(run, model.params, {})


def asked(instance: Any, kind: str, *arguments: Any) -> list[Any]:
    return [instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_likelihoods_are_our_own(parts: Any) -> None:
    instance, tokenizer, logprobs = parts
    lm = harness.model(tokenizer, logprobs, lambda p, n, t: [], max_length=64)
    got = lm.loglikelihood(asked(instance, "loglikelihood", *PAIRS), disable_tqdm=True)
    want = likelihood.measure(logprobs, likelihood.requests(tokenizer, PAIRS))
    assert got == [(one.logprob, one.greedy) for one in want]


def test_a_long_context_loses_its_beginning(parts: Any) -> None:
    instance, tokenizer, logprobs = parts
    lm = harness.model(tokenizer, logprobs, lambda p, n, t: [], max_length=6)
    got = lm.loglikelihood(
        asked(instance, "loglikelihood", ("one two three " * 9, "hello")), disable_tqdm=True
    )
    whole = tokenizer.encode("one two three " * 9 + "hello")
    own = len(whole) - len(tokenizer.encode(("one two three " * 9).rstrip()))
    cut = likelihood.Request(tuple(whole[-7:]), 7 - own)
    assert got[0][0] == likelihood.measure(logprobs, [cut])[0].logprob


def test_rolling_windows_are_the_harnesss(parts: Any) -> None:
    """Its own windows of a text, each judged by itself."""
    from lm_eval import utils

    instance, tokenizer, logprobs = parts
    lm = harness.model(tokenizer, logprobs, lambda p, n, t: [], max_length=8)
    text = "the user asks the assistant for red green blue one two three hello"
    got = lm.loglikelihood_rolling(asked(instance, "loglikelihood_rolling", (text,)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = utils.get_rolling_token_windows(ids, tokenizer.bos_token_id, 8, 1)
    wanted = [
        likelihood.Request((*context, *own), len(context))
        for context, own in map(utils.make_disjoint_window, windows)
    ]
    assert len(wanted) > 1
    want = sum(one.logprob for one in likelihood.measure(logprobs, wanted))
    # The same sums in other rows of a batch.
    np.testing.assert_allclose(got, [want], rtol=1e-5)


def test_answers_end_where_the_task_says(parts: Any) -> None:
    instance, tokenizer, logprobs = parts
    seen: list[tuple[list[str], int, float]] = []

    def answer(prompts: list[list[int]], new: int, temperature: float) -> list[str]:
        seen.append(([tokenizer.decode(p) for p in prompts], new, temperature))
        return [f"{tokenizer.decode(p)}!\n\nQ: more" for p in prompts]

    lm = harness.model(tokenizer, logprobs, answer, max_length=16, prompts_at_once=2)
    got = lm.generate_until(
        asked(
            instance,
            "generate_until",
            ("red", {"until": ["\n\n", "Q:"], "max_gen_toks": 4}),
            ("the user asks", {"until": "user", "max_gen_toks": 4, "do_sample": False}),
            ("blue", {"max_gen_toks": 4, "do_sample": False, "temperature": 0.7}),
            ("one two", {"max_gen_toks": 9, "do_sample": True, "temperature": 0.7}),
        )
    )
    assert got == ["red!", "the ", "blue!\n\nQ: more", "one two!\n\nQ: more"]
    assert [(new, temperature) for _, new, temperature in seen] == [(4, 0.0), (4, 0.0), (9, 0.7)]
    assert seen[0][0][0] == "the user asks", "long prompts first"
    with pytest.raises(errors.UserError, match="16 positions"):
        lm.generate_until(asked(instance, "generate_until", ("red", {"max_gen_toks": 16})))


def test_a_task_of_the_harness_runs(parts: Any, tmp_path: pathlib.Path) -> None:
    """A multiple choice task from a file, scored by it and by us."""
    import json

    import lm_eval
    from lm_eval import tasks

    from jft.evals import abilities

    instance, tokenizer, logprobs = parts
    rows = [
        {"query": f"Question: {w}?", "choices": ["red green", "blue", "hello one"], "gold": i % 3}
        for i, w in enumerate("the user asks the assistant for".split())
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm")],
    }
    lm = harness.model(tokenizer, logprobs, lambda p, n, t: [], max_length=128)
    manager = tasks.TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    items = abilities.read(str(file))
    ours = abilities.judge(
        items, likelihood.measure(logprobs, abilities.requests(tokenizer, items))
    )
    ours = {r.name: r.value for r in ours}
    theirs = found["results"]["own"]
    assert theirs["acc,none"] == pytest.approx(ours["accuracy"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["accuracy_norm"])
