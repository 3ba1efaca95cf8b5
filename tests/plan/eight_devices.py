# SPDX-License-Identifier: Apache-2.0
"""Collectives of programs over eight devices, against counts by hand; `test_collectives.py` runs this file in its own process."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jft.plan import hlo

assert jax.device_count() == 8
MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
EVERY = P(("data", "fsdp", "tensor"))
ROWS, D = 16, 32  # of one device
BYTES = 4 * ROWS * D


def analysed(f: Any, *shapes: tuple[tuple[int, ...], P]) -> hlo.Analysis:
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))
        for shape, spec in shapes
    ]
    return hlo.analyse(jax.jit(f).lower(*arguments).compile().as_text(), MESH.shape)


def sent(f: Any) -> dict[tuple[str, tuple[str, ...]], float]:
    mapped = jax.shard_map(f, mesh=MESH, in_specs=EVERY, out_specs=EVERY, check_vma=False)
    found = analysed(mapped, ((8 * ROWS, D), EVERY))
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for own in found.collectives:
        totals[own.kind, own.axes] = totals.get((own.kind, own.axes), 0) + own.total
    return totals


def test_each_kind_over_its_axes() -> None:
    def f(x: jax.Array) -> jax.Array:
        gathered = lax.all_gather(x, "fsdp", tiled=True)
        both = lax.all_gather(x, ("fsdp", "tensor"), tiled=True)
        scattered = lax.psum_scatter(gathered, "tensor", tiled=True)
        exchanged = lax.all_to_all(x, "tensor", 0, 0, tiled=True)
        moved = lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return lax.psum(x, ("data", "tensor")) + both[:ROWS] + scattered + exchanged + moved

    assert sent(f) == {
        ("all-gather", ("fsdp",)): BYTES,
        ("all-gather", ("fsdp", "tensor")): 3 * BYTES,
        ("reduce-scatter", ("tensor",)): BYTES,  # half of what the gather doubled
        ("all-to-all", ("tensor",)): BYTES / 2,
        ("collective-permute", ("data",)): BYTES,
        ("all-reduce", ("data", "tensor")): 2 * BYTES * 3 / 4,
    }


def test_a_loop_sends_as_often_as_it_runs() -> None:
    def f(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 7, lambda i, x: jnp.sin(lax.psum(x, "fsdp")), x)

    assert sent(f) == {("all-reduce", ("fsdp",)): 7 * BYTES}


def test_weights_sharded_by_rows_are_gathered_in_their_dtype() -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        w = lax.with_sharding_constraint(w, NamedSharding(MESH, P()))
        return (x @ w).sum()

    found = analysed(f, ((64, 32), P("fsdp")), ((8, 64), P("data")))
    gathers = [own for own in found.collectives if own.kind == "all-gather"]
    assert [(own.axes, own.payload, str(*own.shapes)) for own in gathers] == [
        (("fsdp",), 4 * 64 * 32, "f32[64,32]")
    ]
