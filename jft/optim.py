# SPDX-License-Identifier: Apache-2.0
"""The optimizer: AdamW over the trainable tree, with a schedule and clipping, all from optax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft import errors

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW (https://arxiv.org/abs/1711.05101).

    Attributes:
      learning_rate: the peak.
      schedule: after warm-up: "cosine" or "linear" to zero, or "constant".
      warmup_fraction: part of all steps over which the rate rises from 0 to its peak.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, on everything that trains.
      lora_plus_ratio: the learning rate of adapters' B over that of the rest (LoRA+, https://arxiv.org/abs/2402.12354).
      clip_norm: gradients are scaled to at most this global L2 norm; 0 = never.
      max_skipped: steps in a row that may be skipped because loss or gradient is not finite; see `divergence.Watch`.
    """

    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    clip_norm: float = 1.0
    max_skipped: int = 5

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise errors.UserError(
                f"optim.schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}"
            )
        if not self.learning_rate > 0:
            raise errors.UserError(f"optim.learning_rate={self.learning_rate}: it must be above 0")
        if not self.lora_plus_ratio > 0:
            raise errors.UserError(
                f"optim.lora_plus_ratio={self.lora_plus_ratio}: it must be above 0"
            )
        if not 0 <= self.warmup_fraction <= 1:
            raise errors.UserError(f"optim.warmup_fraction={self.warmup_fraction}: between 0 and 1")
        if self.max_skipped < 0:
            raise errors.UserError(f"optim.max_skipped={self.max_skipped}: it must be 0 or more")


def schedule(c: Optim, steps: int) -> optax.Schedule:
    """The learning rate at each step (0, 1, ...) of a run of `steps`."""
    warmup = round(c.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(c.learning_rate, rest),
        "linear": optax.linear_schedule(c.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(c.learning_rate),
    }[c.schedule]
    if not warmup:
        return after
    # From 1 / warmup, not from 0: a step at rate 0 would be a step wasted.
    rise = optax.linear_schedule(c.learning_rate / warmup, c.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def optimizer(c: Optim, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps`; its state has two moments for each trainable array."""
    adamw = optax.adamw(
        schedule(c, steps), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay
    )
    parts = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
    parts.append(adamw)
    if c.lora_plus_ratio != 1:
        parts.append(optax.masked(optax.scale(c.lora_plus_ratio), _is_b))
    return optax.chain(*parts) if len(parts) > 1 else adamw


def choose(good: jax.Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` where the step is good, else `old`: of trainable trees and of the optimizer's states.

    The schedule's count goes on all the same: the learning rate belongs to the step, not to the updates made. Adam's own
    count, by which the moments are corrected, is that of the updates in them.
    """

    def one(new: Any, old: Any) -> Any:
        if _is_schedule(new):
            return new
        return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

    return jax.tree.map(one, new, old, is_leaf=_is_schedule)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


def _is_b(trainable: Any) -> Any:
    """True for the B of each adapter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "b",
        trainable,
    )
