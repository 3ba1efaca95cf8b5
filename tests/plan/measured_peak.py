# SPDX-License-Identifier: Apache-2.0
"""Prints what a training step on this CPU was predicted to take, and by how much the process really grew: a JSON object.

Run in a process of its own: what others do in it would count too.
"""

import json
import pathlib
import resource
import sys

import jax
import jax.numpy as jnp

from jft import config, step
from jft.models import architecture
from jft.plan import fit

MODEL = architecture.Config(
    vocab_size=8192,
    d_model=512,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    d_ff=1536,
    max_length=512,
    tie_embeddings=True,
)


def forget() -> None:
    """From here on the largest resident size is counted anew: the compiler's may have been larger than the steps'."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def grown() -> int:
    """The largest resident size since, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(remat: str, rank: int) -> None:
    c = config.base()
    c.batch_size, c.micro_batch, c.remat, c.lora.rank = 8, 8, remat, rank
    ready = fit.check(c, MODEL, jax.devices(), length=512, eval_length=512, steps=10)
    forget()
    before = resident()
    fill = lambda x: jnp.full(x.shape, 0.01, x.dtype)  # noqa: E731
    trainable = jax.tree.map(fill, ready.state.trainable)
    frozen = jax.tree.map(fill, ready.frozen)
    state = step.init_state(trainable, ready.optimizer)
    batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), ready.batch(8))
    del trainable
    for _ in range(2):
        state, metrics = ready.train_step(state, frozen, batch)
    jax.block_until_ready(state)
    print(
        json.dumps(
            {
                "predicted": ready.train_bytes,
                "measured": grown() - before,
                "loss": float(metrics["loss"]),
            }
        )
    )


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
