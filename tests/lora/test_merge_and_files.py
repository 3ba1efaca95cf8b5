# SPDX-License-Identifier: Apache-2.0
"""Merging says what survives and can be undone; files give back what was saved, or say what is wrong with them."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import errors, lora


def make(dtype: Any = jnp.float32, size: float = 0.1) -> tuple[dict[str, Any], lora.Adapters]:
    """W of deviation 1 and an update of this relative size, and a leaf without an adapter."""
    rng = np.random.default_rng(0)
    params = {"layer": {"w": jnp.asarray(rng.normal(size=(200, 100)), dtype)}, "v": jnp.ones(3)}
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((200, 4), (4, 100)))
    return params, {"layer/w": lora.Factors(a, b, size / 2, "io")}  # |A B| has deviation 2


def test_merge_rounds_once_and_unmerge_gives_back_every_bit() -> None:
    params, adapters = make(jnp.bfloat16)
    merged = lora.merge(params, adapters)
    exact = np.asarray(params["layer"]["w"], np.float32) + np.asarray(
        lora.delta(adapters["layer/w"])
    )
    want = jnp.asarray(exact).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged.params["layer"]["w"], want)
    assert merged.params["v"] is params["v"]
    back = lora.unmerge(merged)
    np.testing.assert_array_equal(back["layer"]["w"], params["layer"]["w"])


@pytest.mark.parametrize(("size", "low", "high"), [(0.1, 0.999, 1.0), (0.001, 0.4, 0.8)])
def test_what_survives_bfloat16(size: float, low: float, high: float) -> None:
    """Against numpy; 8 bits keep two thirds of an update of a thousandth."""
    params, adapters = make(jnp.bfloat16, size)
    got = lora.merge(params, adapters, min_cosine=0).report["layer/w"]
    w = np.asarray(params["layer"]["w"], np.float64)
    update = np.asarray(lora.delta(adapters["layer/w"]), np.float64)
    kept = np.asarray(jnp.asarray(w + update).astype(jnp.bfloat16), np.float64) - w
    cosine = (update * kept).sum() / np.sqrt((update**2).sum() * (kept**2).sum())
    # The sum is rounded to float32 before bfloat16, which moves some ties.
    assert got.cosine == pytest.approx(cosine, rel=1e-2)
    assert got.gain == pytest.approx((update * kept).sum() / (update**2).sum(), rel=1e-2)
    assert got.relative == pytest.approx(np.linalg.norm(update) / np.linalg.norm(w), rel=1e-2)
    assert low < got.cosine <= high


def test_too_little_that_survives_is_refused() -> None:
    params, adapters = make(jnp.bfloat16, 0.001)
    with pytest.raises(
        errors.UserError, match="layer/w: rounding to bfloat16 leaves a cosine of 0"
    ):
        lora.merge(params, adapters)
    merged = lora.merge(params, adapters, dtype=jnp.float32)
    assert merged.params["layer"]["w"].dtype == jnp.float32
    assert merged.report["layer/w"].cosine > 0.999


def test_not_finite_is_refused() -> None:
    params, adapters = make()
    broken = dataclasses.replace(adapters["layer/w"], b=adapters["layer/w"].b.at[1, 2].set(jnp.nan))
    with pytest.raises(
        errors.UserError, match="layer/w: the update holds values that are not finite"
    ):
        lora.merge(params, {"layer/w": broken})


def test_a_fresh_adapter_merges_to_the_base() -> None:
    params, _ = make(jnp.bfloat16)
    fresh = lora.init(lora.Spec(targets="layer/w"), params, key=jax.random.key(0))
    merged = lora.merge(params, fresh)
    np.testing.assert_array_equal(merged.params["layer"]["w"], params["layer"]["w"])
    assert merged.report["layer/w"] == lora.Survival(relative=0.0, gain=1.0, cosine=1.0)


def test_one_array_at_two_paths_is_untied() -> None:
    table = jnp.ones((6, 4))
    factors = lora.Factors(jnp.ones((6, 2)), jnp.ones((2, 4)), 0.5, "io")
    merged = lora.merge({"embed": table, "head": table}, {"head": factors}).params
    np.testing.assert_array_equal(merged["embed"], table)
    np.testing.assert_array_equal(merged["head"], table + 1)


@pytest.mark.parametrize("use_dora", [False, True])
def test_saved_is_loaded_byte_for_byte(tmp_path: pathlib.Path, use_dora: bool) -> None:
    params, _ = make()
    spec = lora.Spec(rank=3, targets="layer/w", dropout=0.1, use_dora=use_dora)
    adapters = lora.init(spec, params, key=jax.random.key(0))
    lora.save(tmp_path / "a.safetensors", adapters)
    back = lora.load(tmp_path / "a.safetensors", params)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    lora.save(tmp_path / "b.safetensors", back)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def _tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import safetensors

    with safetensors.safe_open(path, "np") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def _edit(path: pathlib.Path, change: Any) -> None:
    tensors, metadata = _tensors(path)
    change(tensors)
    path.write_bytes(safetensors_numpy.save(tensors, metadata))


def _say(path: pathlib.Path, header: str) -> None:
    tensors, metadata = _tensors(path)
    path.write_bytes(safetensors_numpy.save(tensors, dict.fromkeys(metadata, header)))


DAMAGE: dict[str, tuple[Any, str]] = {
    "absent": (lambda p: p.unlink(), "no such file"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "not a readable safetensors file"),
    "not safetensors": (lambda p: p.write_bytes(b"PK\3\4 pickle"), "not a readable safetensors"),
    "no header of ours": (
        lambda p: p.write_bytes(safetensors_numpy.save(_tensors(p)[0], {"format": "pt"})),
        "no adapter of jft.lora.save",
    ),
    "header of no JSON": (lambda p: _say(p, "{"), "its header is damaged"),
    "header without a scale": (
        lambda p: _say(p, '{"layer/w": {"layout": "io", "dropout": 0.0}}'),
        "its header is damaged: it says {'layout'",
    ),
    "scale that is no number": (
        lambda p: _say(p, '{"layer/w": {"scale": "1", "layout": "io", "dropout": 0.0}}'),
        "its header is damaged",
    ),
    "missing": (lambda p: _edit(p, lambda t: t.pop("layer/w/b")), "layer/w/b is missing"),
    "extra": (lambda p: _edit(p, lambda t: t.update(x=np.ones(2))), "holds x, which its header"),
    "not finite": (
        lambda p: _edit(p, lambda t: t["layer/w/a"].__setitem__((0, 0), np.inf)),
        "layer/w/a holds values that are not finite",
    ),
    "another shape": (
        lambda p: _edit(p, lambda t: t.update({"layer/w/a": np.ones((7, 4), np.float32)})),
        "do not fit the leaf",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: pathlib.Path, damage: str) -> None:
    params, adapters = make()
    path = tmp_path / "adapter.safetensors"
    lora.save(path, adapters)
    change, message = DAMAGE[damage]
    change(path)
    with pytest.raises(errors.UserError) as caught:
        lora.load(path, params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(tmp_path: pathlib.Path) -> None:
    _, adapters = make()
    lora.save(tmp_path / "a.safetensors", adapters)
    with pytest.raises(errors.UserError, match="layer/w.*matches no parameter"):
        lora.load(tmp_path / "a.safetensors", {"other": jnp.ones((200, 100))})


def test_the_header_is_readable_json(tmp_path: pathlib.Path) -> None:
    _, adapters = make()
    lora.save(tmp_path / "a.safetensors", adapters)
    (saved,) = _tensors(tmp_path / "a.safetensors")[1].values()
    assert json.loads(saved) == {"layer/w": {"scale": 0.05, "layout": "io", "dropout": 0.0}}
