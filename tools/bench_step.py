# SPDX-License-Identifier: Apache-2.0
"""Times training steps of a model preset on the devices that are here: seconds, tokens/s, memory beside the predicted.

    python tools/bench_step.py --model=llama3.1-8b --length=2048 --steps=8 batch_size=2 model.quantize=nf4 remat=full

The weights are made up on the devices, so nothing is downloaded and no host memory is needed; a step takes as long with
them as with real ones. Prints one JSON object. Memory is the allocator's peak, on a CPU unknown (null).
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft import config, errors, jobs, step
from jft.models import families
from jft.plan import chips, fit


def invented(like: Any) -> jax.Array:
    """An array of that shape: any bits where it is of integers, small numbers otherwise; made without a temporary."""
    flat = lax.iota(jnp.uint32, max(1, math.prod(like.shape[-2:])))
    mixed = (flat * jnp.uint32(2654435761)) >> 16
    wide = jnp.broadcast_to(mixed.reshape(like.shape[-2:]), like.shape)
    if jnp.issubdtype(like.dtype, jnp.integer):
        return wide.astype(like.dtype)
    return ((wide.astype(jnp.float32) / 65536 - 0.5) * 0.04).astype(like.dtype)


def place(shapes: Any, make: Any) -> Any:
    """The tree, one array after the other, each where its shape says."""
    one = lambda x: jax.jit(lambda: make(x), out_shardings=x.sharding)()  # noqa: E731
    return jax.tree.map(one, shapes)


def traced(run: Any, most: int) -> None:
    """Prints the kernels that a run spends its time in, the longest first: milliseconds, count, name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(found)).planes
        times: dict[str, list[float]] = collections.defaultdict(list)
        for plane in planes:
            for line in plane.lines if "/device:" in plane.name else ():
                if "Stream" in line.name or line.name == "XLA Ops":
                    for event in line.events:
                        times[event.name].append(event.duration_ns / 1e6)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))
    print(f"{sum(map(sum, times.values())):.1f} ms in kernels", file=sys.stderr)
    for name, each in longest[:most]:
        print(f"{sum(each):10.2f} {len(each):6} {name[:120]}", file=sys.stderr)


def measure(c: Any, arch: Any, length: int, steps: int, kernels: int) -> dict[str, Any]:
    devices = jax.devices()
    began = time.perf_counter()
    built = fit.check(c, arch, devices, length=length, eval_length=0, steps=1000)
    compiled = time.perf_counter() - began
    frozen = place(built.frozen, invented)
    trainable = place(built.state.trainable, invented)
    zeros = place(built.state.opt_state, lambda x: jnp.zeros(x.shape, x.dtype))
    state = step.State(jnp.zeros((), jnp.int32), trainable, zeros)
    del trainable, zeros
    rows = built.batch(built.batch_size)
    batch = {k: place(v, lambda x: jnp.ones(x.shape, x.dtype)) for k, v in rows.items()}
    ids = lambda x: invented(x) % arch.vocab_size  # noqa: E731
    batch["tokens"], batch["targets"] = (place(rows[k], ids) for k in ("tokens", "targets"))
    batch["positions"] = place(
        rows["positions"], lambda x: lax.broadcasted_iota(x.dtype, x.shape, 1)
    )
    times = []
    for _ in range(steps + 2):  # the first two are warm-up
        began = time.perf_counter()
        state, metrics = built.train_step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    if kernels:
        traced(lambda: jax.block_until_ready(built.train_step(state, frozen, batch)[1]), kernels)
    stats = devices[0].memory_stats() or {}
    seconds = statistics.median(times[2:])
    tokens = built.batch_size * length / len(devices)
    chip = chips.of_kind(devices[0].device_kind)
    flops = (4 if c.lora.rank else 6) * jobs.matmul_parameters(arch) * tokens
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "tokens": built.batch_size * length,
        "seconds": round(seconds, 4),
        "fastest": round(min(times[2:]), 4),
        "tokens_per_second_per_device": round(tokens / seconds, 1),
        "mfu": round(flops / seconds / chip.flops, 4) if chip else None,
        "predicted_gb": round(built.train_bytes / 1e9, 3),
        "measured_gb": round(stats["peak_bytes_in_use"] / 1e9, 3) if stats else None,
        "compile_seconds": round(compiled, 1),
        "loss": float(metrics["loss"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=0, help="instead of all of them")
    parser.add_argument("--kernels", type=int, default=0, help="print the longest ones of a step")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    flags = parser.parse_args()
    c = config.base()
    c.model.dtype, c.data.max_length = "bfloat16", flags.length
    try:
        for change in flags.changes:
            config.override(c, *change.split("=", 1))
        arch = families.preset(flags.model)
        arch = dataclasses.replace(arch, num_layers=flags.layers or arch.num_layers)
        found = measure(c, arch, flags.length, flags.steps, flags.kernels)
    except errors.UserError as error:
        print(f"{flags.model}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"model": flags.model} | found | {"changes": flags.changes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
