# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 on public evaluation sets, item by item against torch and transformers (tools/make_eval_goldens.py)."""

import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest

from jft import models
from jft.evals import abilities, forgetting, likelihood, program

pytestmark = pytest.mark.usefixtures(
    "optimised"
)  # a real model: what is saved in compiling is lost in running
FOLDER = pathlib.Path(__file__).parents[1] / "goldens" / "evals"
GOLDEN = json.loads((FOLDER / "smollm2.json").read_text())
SETS = ("piqa", "arc_easy", "lambada_openai")
# Both are float32. Between two correct implementations a logit of this model differs by 6.5e-5 at most (see the goldens'
# README), and so a choice of n tokens by twice that times n; a fifth of it was found.
EACH_TOKEN = 1.3e-4


def digest(item: abilities.Item) -> str:
    pairs = list(zip(item.contexts, item.continuations, strict=True))
    text = json.dumps([pairs, item.gold], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def model(smollm2_gguf: pathlib.Path) -> models.Model:
    return models.load(str(smollm2_gguf))


def items(shared: pathlib.Path, name: str) -> list[abilities.Item]:
    read = abilities.read(str(shared / "data" / "evals_small" / f"{name}.jsonl"))
    return read[: len(GOLDEN[name])]


@pytest.mark.parametrize("name", SETS)
def test_items_are_those_of_the_golden(shared: pathlib.Path, name: str) -> None:
    """Context and choices as the golden's own script writes them."""
    assert [digest(item) for item in items(shared, name)] == list(GOLDEN[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_item_by_item(shared: pathlib.Path, model: models.Model, name: str) -> None:
    some = items(shared, name)
    run = functools.partial(program.reader(model.config, program.of_targets), model.params, {})
    found = likelihood.measure(run, abilities.requests(model.tokenizer, some))
    each = iter(found)
    chosen: dict[str, list[bool]] = {"sum": [], "characters": []}
    for item in some:
        want = GOLDEN[name][digest(item)]
        for i, text in enumerate(item.continuations):
            got = next(each)
            assert got.tokens == want["tokens"][i], (item, text)
            assert got.greedy == want["greedy"][i], (item, text)
            assert got.logprob == pytest.approx(want["logprob"][i], abs=EACH_TOKEN * got.tokens)
        sums = np.array(want["logprob"])
        sizes = np.array([len(text) - 1 for text in item.continuations])
        chosen["sum"].append(int(sums.argmax()) == item.gold)
        chosen["characters"].append(int((sums / sizes).argmax()) == item.gold)
    scores = {r.name: r.value for r in abilities.judge(some, found)}
    if "accuracy" in scores:
        assert scores["accuracy"] == np.mean(chosen["sum"])
        assert scores["accuracy_norm"] == np.mean(chosen["characters"])


@pytest.mark.slow
def test_forgetting_of_weights_with_noise(model: models.Model) -> None:
    """Noise of 5 % in every weight is seen, and the more of the base's likeliest tokens are kept, the more of the KL.

    Measured: a rise of 0.183 nats (0.131 to 0.235), a KL of 0.226 with 16 tokens kept and of 0.264 with 64.
    """
    read = functools.partial(program.reader, model.config)
    probe = forgetting.probe(model.tokenizer, tokens=1000)
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def shaken(x: jax.Array) -> jax.Array:
        return x * (1 + 0.05 * jax.random.normal(next(keys), x.shape, x.dtype))

    other = jax.tree.map(shaken, model.params)
    then = functools.partial(read(program.of_ids), other, {})
    found = []
    for count in (16, forgetting.LIKELIEST):
        asked = read(functools.partial(program.likeliest, count))
        base = forgetting.of_base(functools.partial(asked, model.params, {}), probe)
        found.append(forgetting.of_tuned(then, probe, base))
    few, many = found
    assert few.rise == many.rise
    assert few.rise.value == pytest.approx(0.183, abs=2e-3)
    assert 0.8 * many.kl.value < few.kl.value < many.kl.value
