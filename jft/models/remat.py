# SPDX-License-Identifier: Apache-2.0
"""What the backward pass keeps of each layer, and what it computes again: named policies.

A layer's input (the residual stream) is always there. The more is kept beside it, the less is computed again and the more
memory a step takes; `jft plan --search` tries them. Low-rank products of adapters are never kept by a policy of names;
`dots` keeps them too unless `lora.mode` is `hidden`.
"""

from collections.abc import Callable
from typing import Any

import jax

from jft.models import attention

# What the backward pass of attention needs, so that neither its products nor its kernel run again.
ATTENTION = ("query", "key", "value", "attended", "attention_lse", "middle")
# All that the products' gradients need: nothing but norms, rotations and activations is computed again.
PRODUCTS = (*ATTENTION, "gate", "up", "gate_up")
STREAM = ("stream",)


def _kept(names: tuple[str, ...]) -> Any:
    """What is named so, and the results of attention kernels that can't be named."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        return named(primitive, *args, **params) or attention.saves(primitive, *args, **params)

    return policy


def _offloaded(kept: tuple[str, ...]) -> Any:
    """Keeps nothing on the device: the stream and `kept` go to the host's memory and come back."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*STREAM, *kept],
        offload_src="device",
        offload_dst="pinned_host",
    )


POLICIES: dict[str, Any] = {
    "none": None,  # everything is kept
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _kept(ATTENTION),
    "products": _kept(PRODUCTS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": _offloaded(()),
    "offload_attention": _offloaded(ATTENTION),
}


def layer(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A scan's body under a policy."""
    if policy == "none":
        return function
    # A scan runs its body once per layer: nothing could be shared between forward and backward.
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)
