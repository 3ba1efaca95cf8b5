# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on a mesh: each device sorts its own tokens by expert, and computes the experts that it holds.

Where experts are split over the mesh, the devices that share them bring their tokens together, each computes its own
experts' part of every token, and the parts are summed. Within an expert `tensor` splits the inner dimension.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jft import sharding
from jft.models import experts


def run(
    module: experts.Experts,
    x_BTD: jax.Array,
    logits_ME: jax.Array,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
    layout: sharding.Layout,
) -> jax.Array:
    """`module(x_BTD, logits_ME, activate)`, its kernels gathered over what only stores them."""
    definition, state = nnx.split(module)
    kernels = nnx.to_pure_dict(state)
    logits_BTE = logits_ME.reshape(*x_BTD.shape[:2], -1)

    def local(kernels: Any, x_BTD: jax.Array, logits_BTE: jax.Array) -> jax.Array:
        part: experts.Experts = nnx.merge(definition, _shared_bias(kernels, layout))
        return _local(part, x_BTD, logits_BTE, activate, layout)

    stream = P(layout.used(sharding.ROWS), layout.used(("context",)), None)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(_specs(kernels, layout), stream, stream),
        out_specs=stream,
        check_vma=False,  # the kernel of `ragged_dot` on TPU doesn't say over which axes its result varies
    )(kernels, x_BTD, logits_BTE)


def _specs(kernels: Any, layout: sharding.Layout) -> Any:
    def spec(name: str, part: str, leaf: jax.Array) -> P:
        # Of one layer: without the layers' dimension.
        return P(*layout.computed(f"layers/experts/{name}/{part}", (1, *leaf.shape))[1:])

    return {
        name: {part: spec(name, part, leaf) for part, leaf in parts.items()}
        for name, parts in kernels.items()
    }


def _shared_bias(kernels: Any, layout: sharding.Layout) -> Any:
    """With the bias of `down` divided by the devices of `tensor`, each of which adds it."""
    down = kernels["down"]
    if "bias" not in down:
        return kernels
    return kernels | {"down": down | {"bias": down["bias"] / layout.size("tensor")}}


def _local(
    module: experts.Experts,
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
    layout: sharding.Layout,
) -> jax.Array:
    """Of one device's tokens."""
    count, shares = module.experts.count, layout.size("expert")
    _, weight_MK, chosen_MK = experts.choice(module.experts, logits_BTE.reshape(-1, count))
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    if shares == 1:
        y_MD = module.here(x_MD, weight_MK, chosen_MK, 0, count, activate)
    else:
        gathered = (lax.all_gather(x, "expert", tiled=True) for x in (x_MD, weight_MK, chosen_MK))
        first = lax.axis_index("expert") * (count // shares)
        y_MD = module.here(*gathered, first, count // shares, activate)
        y_MD = lax.psum_scatter(y_MD, "expert", tiled=True)
    if layout.used(("tensor",)):
        y_MD = lax.psum(y_MD, "tensor")
    return y_MD.reshape(x_BTD.shape)
