# SPDX-License-Identifier: Apache-2.0
"""LoRA on a mesh equals LoRA on one device: NamedSharding with both kinds of axes, and shard_map by hand."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jft import errors, lora, quant

assert jax.device_count() == 8
pytestmark = pytest.mark.usefixtures("x64")
# Both sides are double-precision sums of tens of terms of order 1, in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)

L, B, D, F = 3, 8, 16, 32
LAYOUTS = (("up|down", "bio"), ("head", "io"))
# Megatron's way: up by columns, down by rows over `tensor`; the other dimension over `fsdp`.
SPECS = {
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
    "head": P("fsdp", None),
}
X_SPEC = P("fsdp", None)


def make(use_dora: bool = False) -> tuple[dict[str, jax.Array], lora.Adapters, jax.Array]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape)) * 0.3  # noqa: E731
    params = {"up": normal(L, D, F), "down": normal(L, F, D), "head": normal(D, D)}
    spec = lora.Spec(rank=2, alpha=3.0, targets=".*", layouts=LAYOUTS, use_dora=use_dora)
    adapters = lora.init(spec, params, key=jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + normal(*x.shape), adapters)
    return params, adapters, normal(B, D)


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))


def place(tree: Any, specs: Any, on: jax.sharding.Mesh) -> Any:
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(on, spec))  # noqa: E731
    return jax.tree.map(put, tree, specs)


def adapter_specs(adapters: lora.Adapters) -> lora.Adapters:
    return {path: lora.partition_spec(f, SPECS[path]) for path, f in adapters.items()}


def model(params: Any, x: jax.Array) -> jax.Array:
    """For one device and for Auto axes."""

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = lax.scan(layer, x, {k: params[k] for k in ("up", "down")})
    return x @ params["head"]


def model_explicit(params: Any, x: jax.Array) -> jax.Array:
    """The same with shardings in its types: weights are gathered over fsdp, sums over tensor are said."""
    gather = jax.sharding.reshard

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(x @ gather(w["up"], P(None, "tensor")))
        down = gather(w["down"], P("tensor", None))
        return x + jnp.einsum("bf,fd->bd", h, down, out_sharding=X_SPEC), None

    x, _ = lax.scan(layer, x, {k: params[k] for k in ("up", "down")})
    return x @ gather(params["head"], P(None, None))


def shard_mapped(on: jax.sharding.Mesh, check_vma: bool) -> Callable:
    """The same, each device's part written out: all_gather over fsdp, psum over tensor."""

    def local(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            up = lax.all_gather(w["up"], "fsdp", axis=0, tiled=True)
            down = lax.all_gather(w["down"], "fsdp", axis=1, tiled=True)
            return x + lax.psum(jnp.tanh(x @ up) @ down, "tensor"), None

        x, _ = lax.scan(layer, x, {k: params[k] for k in ("up", "down")})
        return x @ lax.all_gather(params["head"], "fsdp", axis=0, tiled=True)

    return jax.shard_map(
        local, mesh=on, in_specs=(SPECS, X_SPEC), out_specs=X_SPEC, check_vma=check_vma
    )


def loss(f: Callable, mode: str) -> Callable:
    g = lora.transform(f, mode=mode)
    return lambda adapters, params, x: jnp.sin(g(params, adapters, x)).sum()


def check(f: Callable, kind: AxisType, mode: str, use_dora: bool = False) -> None:
    params, adapters, x = make(use_dora)
    want = jax.value_and_grad(loss(model, "factored"))(adapters, params, x)
    on = mesh(kind)
    specs = adapter_specs(adapters)
    with jax.set_mesh(on):
        placed = place(adapters, specs, on), place(params, SPECS, on), place(x, X_SPEC, on)
        value, grads = jax.jit(jax.value_and_grad(loss(f, mode)))(*placed)
    jax.tree.map(close, (value, grads), want)
    if (
        kind == AxisType.Explicit
    ):  # then types say that gradients are sharded as what they belong to
        for grad, spec in zip(jax.tree.leaves(grads), jax.tree.leaves(specs), strict=True):
            assert grad.sharding.is_equivalent_to(jax.NamedSharding(on, spec), grad.ndim)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", lora.MODES)
def test_auto_axes(mode: str, use_dora: bool) -> None:
    check(model, AxisType.Auto, mode, use_dora)


@pytest.mark.parametrize("mode", lora.MODES)
def test_explicit_axes(mode: str) -> None:
    check(model_explicit, AxisType.Explicit, mode)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mode", lora.MODES)
def test_shard_map(mode: str, check_vma: bool) -> None:
    check(shard_mapped(mesh(AxisType.Auto), check_vma), AxisType.Auto, mode)


def test_shard_map_with_dora() -> None:
    check(shard_mapped(mesh(AxisType.Auto), True), AxisType.Auto, "factored", use_dora=True)


def test_nothing_is_materialised_in_a_shard_map() -> None:
    params, adapters, x = make()
    uses = lora.explain(shard_mapped(mesh(AxisType.Auto), True), params, adapters, x)
    assert {use.path for use in uses} == set(params)
    assert all(use.factored for use in uses)


def test_init_shards_factors_like_their_leaf() -> None:
    params, _, _ = make()
    on = mesh(AxisType.Auto)
    spec = lora.Spec(rank=2, targets=".*", layouts=LAYOUTS)
    placed = lora.init(spec, place(params, SPECS, on), key=jax.random.key(0))
    assert placed["up"].a.sharding.spec == P(None, "fsdp", None)
    assert placed["up"].b.sharding.spec == P(None, None, "tensor")
    plain = lora.init(spec, params, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, placed, plain)


def test_sharding_constraints_reach_the_factors() -> None:
    params, adapters, x = make()
    on = mesh(AxisType.Auto)

    def f(params: Any, x: jax.Array) -> jax.Array:
        w = lax.with_sharding_constraint(params["head"], jax.NamedSharding(on, P(None, "tensor")))
        return x @ w

    mine = {"head": adapters["head"]}
    close(lora.transform(f)(params, mine, x), x @ lora.add(params, mine)["head"])
    program = str(jax.make_jaxpr(lora.transform(f))(params, mine, x))
    assert program.count("sharding_constraint") == 3


def quantised(kind: str, layers: int) -> tuple[Any, Any, Any, Any, jax.Array]:
    """A function, quantised parameters of so many layers, where they lie, adapters and an input."""
    rng = np.random.default_rng(0)
    shapes = {"up": (layers, 256, 512), "down": (layers, 512, 256)}
    params = {
        k: quant.quantize(
            jnp.asarray(rng.normal(size=s)) * 0.03, kind, axis=-2, double=kind == "nf4", stacked=1
        )
        for k, s in shapes.items()
    }
    spec = lora.Spec(rank=2, targets="up|down", layouts=LAYOUTS)
    adapters = lora.init(spec, params, key=jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape)) * 0.03, adapters)

    def f(params: Any, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return lax.scan(layer, x, params)[0]

    part = {k: SPECS[k] for k in params}
    return f, params, part, adapters, jnp.asarray(rng.normal(size=(B, 256)))


def on_mesh(f: Any, mode: str, params: Any, part: Any, adapters: Any, x: jax.Array) -> Any:
    """The compiled step, and its arguments where they lie."""
    on = mesh(AxisType.Auto)
    specs = {k: lora.partition_spec(a, SPECS[k]) for k, a in adapters.items()}
    # Of what is shorter than the whole, the mesh may not divide all.
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(on, lora.divided(on, spec, x.shape)))  # noqa: E731
    packed = {k: jax.tree.map(lambda x, s=part[k]: put(x, s), q) for k, q in params.items()}
    placed = place(adapters, specs, on), packed, place(x, X_SPEC, on)
    return jax.jit(jax.value_and_grad(loss(f, mode))).lower(*placed).compile(), placed


@pytest.mark.parametrize(
    ("mode", "kind"), [*((mode, "nf4") for mode in lora.MODES), ("factored", "int8")]
)
def test_19_a_quantised_base_on_a_mesh(mode: str, kind: str) -> None:
    """Equal to one device; no dense stack in the compiled program, whole or a device's part."""
    f, params, part, adapters, x = quantised(kind, L)
    want = jax.value_and_grad(loss(f, mode))(adapters, params, x)
    step, placed = on_mesh(f, mode, params, part, adapters, x)
    jax.tree.map(close, step(*placed), want)
    # Whole, gathered over one axis, or a device's part; scales are floats too, but have one element for 64.
    dense = re.findall(rf"f(?:32|64)\[{L},(?:64|256|512),(?:64|256|512)\]", step.as_text())
    assert not dense


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_19_temporaries_do_not_grow_with_the_layers(mode: str) -> None:
    """But for each layer's input and its adapters' gradients: less than a dense weight of a layer for six more of them."""
    took = []
    for layers in (L, L + 6):
        f, params, part, adapters, x = quantised("nf4", layers)
        step, _ = on_mesh(f, mode, params, part, adapters, x)
        took.append(step.memory_analysis().temp_size_in_bytes)
    dense = 8 * 256 * 512 / 8  # bytes of a device's part in float64
    assert took[0] > dense  # one is there at a time
    assert took[1] - took[0] < dense


def test_dropout_in_a_shard_map() -> None:
    """Devices with other rows draw other masks, those with the same rows the same; unknown without check_vma."""
    on = mesh(AxisType.Auto)

    def local(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    def run(check_vma: bool) -> jax.Array:
        f = jax.shard_map(
            local,
            mesh=on,
            in_specs=({"w": P()}, X_SPEC),
            out_specs=X_SPEC,
            check_vma=check_vma,
        )
        factors = lora.Factors(jnp.eye(D), jnp.eye(D), 1.0, "io", dropout=0.5)
        params = {"w": jnp.zeros((D, D))}
        g = lora.transform(f)
        return g(params, {"w": factors}, jnp.ones((B, D)), dropout_key=jax.random.key(0))

    assert len(np.unique(run(True), axis=0)) == B
    with pytest.raises(errors.UserError, match="check_vma=True"):
        run(False)
