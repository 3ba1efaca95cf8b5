# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers: tiny checkpoints that it wrote, and what it computes from them in float64.

Remade by tools/make_family_goldens.py. The tolerances are those of two implementations that round differently: in
float64 they agree to 1e-9 with a thousand times to spare, in float32 to 1e-4 (logits are of the order of 1 to 10).
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import lora, losses, tree
from jft.models import architecture, decoder, decoding, families, hf, rope

FOLDER = pathlib.Path(__file__).parents[1] / "goldens" / "families"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
REMAKE = "if the change is meant, remake with tools/make_family_goldens.py"


def load(case: str, dtype: str) -> tuple[architecture.Config, Any, dict[str, np.ndarray]]:
    config, params, _ = hf.load(FOLDER / case, dtype)
    with np.load(FOLDER / case / "golden.npz") as stored:
        return config, jax.tree.map(jnp.asarray, params), dict(stored)


def same_length_rule(config: architecture.Config, mask_BT: np.ndarray) -> np.ndarray:
    """Rows to compare: transformers chooses LongRoPE's divisors by the longest row of a batch, we by each row's own."""
    lengths = mask_BT.sum(axis=1)
    if not rope.needs_lengths(config):
        return np.ones(len(lengths), bool)
    limit = rope.original_length(config)
    return (lengths > limit) == (lengths.max() > limit)


def test_there_is_a_golden_for_every_family() -> None:
    found = {hf.read_config(FOLDER / case).family for case in CASES}
    assert found == set(families.FAMILIES)


def check_logits(case: str, dtype: str, atol: float) -> None:
    config, params, golden = load(case, dtype)
    apply = jax.jit(functools.partial(decoder.apply, config))
    for name in sorted(key for key in golden if key.startswith("logits")):
        part = name.removeprefix("logits")
        tokens, positions, mask = (golden[k + part] for k in ("tokens", "positions", "mask"))
        got = np.asarray(apply(params, tokens, positions, mask.astype(np.int32)))
        assert got.dtype == dtype
        rows = same_length_rule(config, mask)
        assert rows.any()
        where = mask.astype(bool) & rows[:, None]
        np.testing.assert_allclose(
            got[where], golden[name][where], rtol=0, atol=atol, err_msg=f"{case} {name}: {REMAKE}"
        )


@pytest.mark.parametrize("case", CASES)
def test_logits_in_double_precision(case: str, x64: None) -> None:
    check_logits(case, "float64", 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_single_precision(case: str) -> None:
    check_logits(case, "float32", 1e-4)


def greedy(
    config: architecture.Config,
    params: Any,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    count: int,
) -> np.ndarray:
    """Decoding with the cache, from prompts padded on either side; one program."""
    B = len(tokens_BT)
    lengths_B = mask_BT.sum(axis=1)
    positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
    positions = int(lengths_B.max()) + count - 1  # the last token is chosen, not read
    last_B = np.where(mask_BT, np.arange(mask_BT.shape[1]), -1).max(axis=1)

    @jax.jit
    def run(params: Any) -> jax.Array:
        cache = decoding.init_cache(config, B, positions, params["embed"]["embedding"].dtype)
        x_BTD, cache = decoding.prefill(
            config, params, tokens_BT, positions_BT, mask_BT.astype(bool), cache
        )
        first_B = decoder.head(config, params, x_BTD[np.arange(B), last_B]).argmax(-1)

        def step(carry: Any, i: jax.Array) -> Any:
            token_B, cache = carry
            x_BD, cache = decoding.step(config, params, token_B, lengths_B + i, cache)
            token_B = decoder.head(config, params, x_BD).argmax(-1)
            return (token_B, cache), token_B

        _, found = jax.lax.scan(step, (first_B, cache), np.arange(count - 1))
        return jnp.stack([first_B, *found], axis=1)

    return np.asarray(run(params))


# Padding on the right where layers differ, windows turn over, and experts sort the rows.
RIGHT = [("right", case) for case in ("gemma3", "gpt_oss", "phi3_longrope")]


@pytest.mark.parametrize(("side", "case"), [("left", case) for case in CASES] + RIGHT)
def test_generation_with_the_cache_equals_argmax_without(case: str, side: str, x64: None) -> None:
    config, params, golden = load(case, "float64")
    tokens, mask, want = (golden[k] for k in ("prompt_tokens", "prompt_mask", "generated"))
    if side == "right":
        tokens, mask = (
            np.stack([np.roll(row, n) for row, n in zip(x, mask.sum(axis=1), strict=True)])
            for x in (tokens, mask)
        )
    if rope.needs_lengths(config):
        # LongRoPE's divisors are chosen once for prompt and answer: compare up to where transformers changes them.
        count = rope.original_length(config) - int(mask.sum(axis=1).max()) + 1
        assert count > 2
        want = want[:, :count]
    got = greedy(config, params, tokens, mask, want.shape[1])
    np.testing.assert_array_equal(got, want, f"{case}: {REMAKE}")


def test_generation_beyond_longrope_s_original_length(x64: None, quick_compiles: None) -> None:
    config, params, golden = load("phi3_longrope", "float64")
    prompt = golden["tokens_right"][:1, : rope.original_length(config) + 1]
    rows, apply = prompt, jax.jit(functools.partial(decoder.apply, config))
    for _ in range(4):
        following = np.asarray(apply(params, rows))[:, -1].argmax(-1)
        rows = np.concatenate([rows, following[:, None]], axis=1)
    got = greedy(config, params, prompt, np.ones_like(prompt), 4)
    np.testing.assert_array_equal(got, rows[:, prompt.shape[1] :])


@pytest.mark.parametrize("case", ["qwen3_moe", "gemma3"])
def test_gradients_of_the_loss(case: str, x64: None) -> None:
    config, params, golden = load(case, "float64")
    tokens, positions = golden["tokens_right"], golden["positions_right"]
    mask = golden["mask_right"].astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    weights = mask * np.roll(mask, -1, axis=1)
    weights[:, -1] = 0

    def loss(params: Any) -> jax.Array:
        x_BTD = decoder.hidden(config, params, tokens, positions, mask)
        head = {k: v for k, v in params.items() if k in ("head", "embed")}
        total, weight = losses.cross_entropy(
            lambda head, _, x: decoder.head(config, head, x), head, {}, x_BTD, targets, weights
        )
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-9, err_msg=REMAKE)
    leaves, rows = tree.flatten(grads), families.tensors(config)
    wanted = [key for key in golden if key.startswith("grad:")]
    assert len(wanted) > 5
    for key in wanted:
        weight, index = rows[key.removeprefix("grad:")]
        got = weight.to_file(np.asarray(leaves[weight.path][index]), config)
        scale = np.abs(golden[key]).max()
        np.testing.assert_allclose(
            got, golden[key], rtol=0, atol=1e-9 * scale, err_msg=f"{key}: {REMAKE}"
        )


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_router_loss(case: str, x64: None) -> None:
    config, params, golden = load(case, "float64")
    mask = golden["mask_right"].astype(np.int32)
    run = jax.jit(functools.partial(decoder.hidden_and_load, config))
    _, load_L = run(params, golden["tokens_right"], golden["positions_right"], mask, mask)
    got = losses.load_balance(load_L.chosen_E, load_L.probability_E, load_L.tokens)
    np.testing.assert_allclose(got, golden["router_loss"], rtol=1e-9, err_msg=REMAKE)


# One for each way that kernels lie and are used.
KERNELS = ["gemma3", "gpt2", "gpt_oss", "llama_bias", "mixtral", "olmo2", "phi3"]


@pytest.mark.parametrize("case", KERNELS)
def test_a_fresh_adapter_on_every_kernel_changes_nothing_and_learns(
    case: str,
) -> None:
    """Fused kernels, experts and routers too: the adapted model is the base bit for bit, and every B has a gradient."""
    config, params, golden = load(case, "float32")
    spec = lora.Spec(rank=2, targets=r"layers/.*/kernel", layouts=architecture.LAYOUTS)
    adapters = jax.jit(lambda params: lora.init(spec, params, key=jax.random.key(0)))(params)
    inputs = (golden["tokens_right"], golden["positions_right"], golden["mask_right"].astype(int))
    apply = functools.partial(decoder.apply, config)
    adapted = lora.transform(apply)
    # Without the compiler's fusions, in which a norm after a product rounds differently with the adapter beside it.
    base = jax.jit(apply)(params, *inputs)
    np.testing.assert_array_equal(jax.jit(adapted)(params, adapters, *inputs), base)

    def total(adapters: Any) -> jax.Array:
        return jnp.sum(adapted(params, adapters, *inputs)[:, :3] ** 2)

    for path, grad in jax.jit(jax.grad(total))(adapters).items():
        assert np.abs(grad.b).max() > 0, path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merged", "hidden"])
def test_adapters_of_experts_train_alike_in_every_mode(mode: str, x64: None) -> None:
    """Through the scan over layers, whose backward pass is traced apart from its forward pass."""
    config, params, golden = load("qwen3_moe", "float64")
    spec = lora.Spec(rank=2, targets=r"layers/experts/.*/kernel", layouts=architecture.LAYOUTS)
    draw = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)  # noqa: E731
    make = lambda params: lora.init(spec, params, key=jax.random.key(0))  # noqa: E731
    adapters = jax.jit(lambda params: jax.tree.map(draw, make(params)))(params)
    inputs = (golden["tokens_right"], golden["positions_right"], golden["mask_right"].astype(int))

    def total(adapters: Any, mode: str) -> jax.Array:
        apply = lora.transform(functools.partial(decoder.apply, config), mode=mode)
        return jnp.sum(apply(params, adapters, *inputs)[:, :3] ** 2)

    gradients = jax.jit(jax.grad(total), static_argnums=1)
    got, want = (gradients(adapters, name) for name in (mode, "factored"))
    for path, factors in want.items():
        for one, other in zip(jax.tree.leaves(got[path]), jax.tree.leaves(factors), strict=True):
            scale = float(jnp.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * scale, err_msg=path)
