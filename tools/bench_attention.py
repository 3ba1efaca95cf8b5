# SPDX-License-Identifier: Apache-2.0
"""Plain against blockwise attention on this machine: seconds of a forward and a backward pass, and temporaries.

    python tools/bench_attention.py [--lengths=512,1024] [--blocks=128,256] [--tokens=4096]

The shapes are SmolLM2-135M's: 9 heads, 3 of keys and values, of 64. Rows are of one example each, or of 8 packed ones.
`--blocks` sets the shortest block, which decides the size up to rows of 16 of them. Behind
`attention.LONGEST_PLAIN` and `blockwise.SMALLEST` stand its figures.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from jft.models import architecture, attention
from jft.models.attention import blockwise

N, K, H = 9, 3, 64


def measure(rows: int, length: int, examples: int, implementation: str) -> tuple[float, float]:
    """Milliseconds, the least of three, and MiB."""
    sizes = {"vocab_size": 8, "d_model": N * H, "num_layers": 1, "d_ff": 8, "max_length": length}
    c = architecture.Config(num_heads=N, num_kv_heads=K, head_dim=H, **sizes)
    q, k, v, weights = (
        jax.random.normal(jax.random.key(i), (rows, length, heads, H))
        for i, heads in enumerate((N, K, K, N))
    )
    segments = jnp.broadcast_to(1 + jnp.arange(length) * examples // length, (rows, length))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        run = functools.partial(attention.attend, c, window=None, implementation=implementation)
        return jnp.sum(run(q, k, v, segments, segments) * weights)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    jax.block_until_ready(step(q, k, v))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(step(q, k, v))
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds), step.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="128,256,512,1024,2048,4096")
    parser.add_argument("--blocks", default="64")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    for length in map(int, options.lengths.split(",")):
        rows = max(options.tokens // length, 1)
        for examples in (1, 8):
            found = {"plain": measure(rows, length, examples, "plain")}
            for block in map(int, options.blocks.split(",")):
                blockwise.SMALLEST = block
                found[f"blocks of {block}"] = measure(rows, length, examples, "blockwise")
            shown = "  ".join(
                f"{name} {ms:.0f} ms {mib:.0f} MiB" for name, (ms, mib) in found.items()
            )
            print(f"{rows} x {length}, {examples} a row: {shown}", flush=True)


if __name__ == "__main__":
    main()
