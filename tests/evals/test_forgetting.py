# SPDX-License-Identifier: Apache-2.0
"""The probe of general text, and what a tuned model has lost of it."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jft import errors, lora, models
from jft.evals import forgetting, program
from jft.models import architecture


def test_the_shipped_probe() -> None:
    texts, kinds = forgetting.shipped()
    sizes = [len(text.encode()) for text in texts]
    assert 30_000 < sum(sizes) < 100_000 and min(sizes) > 200
    share = collections.Counter()
    for kind, size in zip(kinds, sizes, strict=True):
        share[kind] += size / sum(sizes)
    assert set(share) == {
        *("prose", "dialogue", "facts", "code", "arithmetic", "classic", "languages"),
        *("instructions", "web"),
    }
    assert max(share.values()) < 0.4 and min(share.values()) > 0.03
    assert len(set(texts)) == len(texts)
    assert not any("===" in line[:4] for text in texts for line in text.split("\n"))


def test_ones_own_probe(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("One text\nof two lines.\n\n\nAnother.\n")
    assert forgetting.read(str(file))[0] == ["One text\nof two lines.", "Another."]
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"text": "a\\n\\nb"}\n')
    assert forgetting.read(str(lines)) == (["a\n\nb"], ["text"])
    lines.write_text('{"prompt": "a"}\n')
    with pytest.raises(errors.UserError, match="row 1 has no text"):
        forgetting.read(str(lines))
    file.write_text(" \n\n")
    with pytest.raises(errors.UserError, match="no text to judge"):
        forgetting.read(str(file))


@pytest.fixture(scope="module")
def tuned(tiny_model: pathlib.Path, tmp_path_factory: Any) -> tuple[Any, Any, forgetting.Probe]:
    """A model, an adapter that changes it, and a small probe."""
    model = models.load(str(tiny_model))
    layouts = architecture.LAYOUTS
    spec = lora.Spec(rank=2, alpha=8, targets=r"layers/.*/kernel", layouts=layouts)
    adapters = lora.init(spec, model.params, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), adapters
    )
    file = tmp_path_factory.mktemp("probe") / "own.txt"
    texts = ["the user asks for red", "hello one two three green blue", "assistant", "é 12 é"]
    file.write_text("\n\n".join(texts * 3))
    return model, adapters, forgetting.probe(model.tokenizer, str(file), length=32, batch_size=2)


Compare = Callable[..., forgetting.Forgetting]


@pytest.fixture(scope="module")
def compare(tuned: Any) -> Compare:
    """What an adapter has cost, with so many tokens kept; the base is the model with an adapter that does nothing."""
    model, adapters, probe = tuned
    c, params, neutral = model.config, model.params, lora.neutral(adapters, model.params)
    then = program.reader(c, program.of_ids)

    @functools.cache
    def base(count: int) -> forgetting.Base:
        first = program.reader(c, functools.partial(program.likeliest, count))
        return forgetting.of_base(functools.partial(first, params, neutral), probe)

    def of(adapters: Any, count: int = 16) -> forgetting.Forgetting:
        return forgetting.of_tuned(functools.partial(then, params, adapters), probe, base(count))

    return of


def test_rise_and_divergence_are_those_of_all_logits(tuned: Any, compare: Compare) -> None:
    """With as many tokens kept as there are, the KL is the whole one; with fewer, less."""
    model, adapters, probe = tuned
    whole = compare(adapters, model.config.vocab_size)
    apply = jax.jit(lora.transform(model.apply))
    longest = max(len(one.tokens) for one in probe.texts.requests)
    nats, kl, tokens, neutral = np.zeros(2), 0.0, 0, lora.neutral(adapters, model.params)
    for one in probe.texts.requests:
        ids = np.zeros((1, longest), np.int32)
        ids[0, : len(one.tokens)] = one.tokens
        both = [apply(model.params, a, ids)[0, : one.judged] for a in (neutral, adapters)]
        base, now = (np.asarray(jax.nn.log_softmax(x, axis=-1), np.float64) for x in both)
        ids = ids[:, : len(one.tokens)]
        for i, logprobs in enumerate((base, now)):
            nats[i] -= logprobs[np.arange(len(logprobs)), ids[0, 1:]].sum()
        kl += (np.exp(base) * (base - now)).sum()
        tokens += len(base)
    # float32 logits, and the floor of 1e-7 under what is left of a whole distribution.
    assert whole.base.value == pytest.approx(nats[0] / tokens, rel=1e-5)
    assert whole.rise.value == pytest.approx((nats[1] - nats[0]) / tokens, abs=1e-5)
    assert whole.kl.value == pytest.approx(kl / tokens, abs=1e-5)
    few = compare(adapters)
    assert 0 < few.kl.value < whole.kl.value
    assert few.rise == whole.rise


def test_a_fresh_adapter_has_forgotten_nothing(tuned: Any, compare: Compare) -> None:
    model, adapters, _ = tuned
    found = compare(lora.neutral(adapters, model.params))
    assert found.rise.value == 0 and found.level == "nothing that shows"
    assert found.kl.value < 1e-6
    assert not found.alarm(0.0)


def test_words_and_the_alarm(tuned: Any) -> None:
    """Of a model that predicts every second text half a nat a token worse, and of one that loses as much as it gains."""
    probe = tuned[2]
    texts = len(probe.texts.sizes)
    probe = dataclasses.replace(probe, kinds=("prose", "code") * (texts // 2))
    flat = np.log(np.full(16, 1 / 32))

    def shaped(batch: Any, value: Any) -> np.ndarray:
        return np.broadcast_to(value, (*batch["tokens"].shape, *np.shape(value)))

    def asked(batch: Any) -> Any:
        return shaped(batch, -1.0), shaped(batch, flat), shaped(batch, np.arange(16))

    def costs(prose: float, code: float) -> forgetting.Forgetting:
        def compared(batch: Any, ids: Any) -> Any:
            places = next(p for b, p in probe.batches if b is batch)
            own = np.zeros(batch["tokens"].shape)
            for i, (row, span) in places.items():
                own[row, span] = -1 - (prose, code)[probe.texts.owner[i] % 2]
            return own, shaped(batch, flat)

        return forgetting.of_tuned(compared, probe, forgetting.of_base(asked, probe))

    found = costs(0.0, 0.8)
    assert found.base.value == pytest.approx(1)
    assert found.by_kind == pytest.approx({"prose": 0.0, "code": 0.8})
    code = probe.texts.tokens[1::2].sum() / probe.texts.tokens.sum()
    assert found.rise.value == pytest.approx(0.8 * code)
    assert found.kl.value == 0, "the likeliest tokens are as likely as before"
    assert found.level == "much" and found.alarm() and not found.alarm(0.7)
    assert "most on code (+0.800); KL from the base 0.000" in found.text
    even = costs(-0.5, 0.5 * (1 - code) / code)
    assert even.level == "nothing that shows" and not even.alarm(-1.0)
    words = [forgetting.level(x) for x in (-1, 0.03, 0.1, 0.5, 3)]
    assert words == ["nothing that shows", "a little", "some", "much", "nearly everything"]


def test_divergence_of_two_coins() -> None:
    """KL(p || q) by hand, with the rest as one token."""
    p, q = np.array([0.5, 0.3]), np.array([0.25, 0.25])
    want = 0.5 * np.log(2) + 0.3 * np.log(0.3 / 0.25) + 0.2 * np.log(0.2 / 0.5)
    assert forgetting.divergence(np.log(p), np.log(q)) == pytest.approx(want)
    assert forgetting.divergence(np.log(p), np.log(p)) == 0
