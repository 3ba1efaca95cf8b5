# SPDX-License-Identifier: Apache-2.0
"""How long the LoRA transform takes to trace: beside LoRA written by hand, and as the number of layers grows.

    python tools/bench_tracing.py

Prints the median seconds of `jax.make_jaxpr` of value and gradient for the scanned 12-layer transformer of
tests/lora/test_programs.py, by hand and transformed, alternating; then for unscanned models of 10 to 80 layers.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft import lora

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "lora"))
import test_programs as programs  # noqa: E402


def seconds(f: Callable, *args: Any) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.make_jaxpr(jax.value_and_grad(f, argnums=1))(*args)
    return time.perf_counter() - start


def unscanned(params: Any, x: jax.Array) -> jax.Array:
    """The same layers, one after another."""
    for kernels in params["layers"]:
        dense = lambda name, equation, x, w=kernels: jnp.einsum(equation, x, w[name])  # noqa: E731
        x = programs.block(x, dense)
    return jnp.sum(x)


def many_layers(count: int) -> float:
    shapes = {name: shape for name, (shape, _) in programs.KERNELS.items()}
    layer = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params = {"layers": [dict(layer) for _ in range(count)]}
    layouts = tuple((f".*/{name}", layout[1:]) for name, (_, layout) in programs.KERNELS.items())
    spec = lora.Spec(rank=4, targets="layers/.*", layouts=layouts)
    adapters = lora.init(spec, params, key=jax.random.key(0))
    return seconds(lora.transform(unscanned), params, adapters, jnp.ones((programs.T, programs.D)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    args = programs.make()
    contestants = {"by hand": programs.model_by_hand, "transformed": lora.transform(programs.model)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(flags.rounds + 1):
        for name, f in contestants.items():
            took = seconds(f, *args)
            if i:  # the first round imports and warms up
                times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"12 scanned layers, {name:12} {value:6.3f} s")
    print(f"ratio {medians['transformed'] / medians['by hand']:.2f}")
    for count in (10, 20, 40, 80):
        took = statistics.median(many_layers(count) for _ in range(3))
        print(f"{count} unscanned layers {took:7.2f} s, {1000 * took / count:5.1f} ms a layer")


if __name__ == "__main__":
    main()
