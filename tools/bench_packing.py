# SPDX-License-Identifier: Apache-2.0
"""How long packing takes and how full it makes rows, and how long it takes to get at a batch and to fill it.

    python tools/bench_packing.py

Prints, for a million lengths of several distributions and capacities, the seconds of `packing.pack` and the efficiency
beside the best that any packing could reach; then for a million rows of text-like lengths the seconds to make `Batches`, to
get the batch at step 1,000,000 of a fresh run, and to fill batches one after another.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np

from jft.data import batches, packing, rows

CAPACITIES = (1024, 2048, 8192, 32768, 131072)


class Made:
    """Rows made when they are read, as from a memory map."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)
        self.trained = np.maximum(1, self.lengths // 2)
        self._tokens = np.arange(2**18, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> rows.Row:
        n = int(self.lengths[index]) + 1
        return rows.Row(self._tokens[:n], self._tokens[:n] > n // 2, "made")


def distributions(count: int, capacity: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    yield "text-like", np.clip(rng.lognormal(5, 1, count).astype(int), 1, capacity)
    yield "any length", rng.integers(1, capacity + 1, count)
    yield "mostly short", np.maximum(1, (capacity * rng.random(count) ** 8).astype(int))
    yield "around a half", rng.integers(3 * capacity // 8, 3 * capacity // 4, count)
    yield "over a quarter", rng.integers(capacity // 4, capacity // 2, count)
    yield "below 64", rng.integers(1, 64, count)
    yield "all 700", np.full(count, 700)


def fewest_bins(lengths: np.ndarray, capacity: int) -> int:
    """No packing has fewer: the sum's, and rows over a half share no bin with each other."""
    by_sum = -(-int(lengths.sum()) // capacity)
    return max(by_sum, int((2 * lengths > capacity).sum()))


def show_packing(count: int) -> None:
    print(f"packing {count:,} lengths\n capacity  lengths          seconds  efficiency  at most")
    for capacity in CAPACITIES:
        for name, lengths in distributions(count, capacity):
            start = time.perf_counter()
            bins = packing.pack(lengths, capacity)
            took = time.perf_counter() - start
            full = lengths.sum() / capacity
            most = full / fewest_bins(lengths, capacity)
            print(f"{capacity:9}  {name:15} {took:8.2f} {full / len(bins):11.4f} {most:8.4f}")


def show_batches(count: int, packed: bool, steps: int = 200) -> None:
    _, lengths = next(distributions(count, 2048))
    start = time.perf_counter()
    made = batches.Batches([Made(lengths)], batch_size=16, length=2048, seed=0, packing=packed)
    ready = time.perf_counter()
    made.batch(10**6)
    there = time.perf_counter()
    tokens = sum(np.count_nonzero(made.batch(10**6 + i)["segments"]) for i in range(steps))
    filled = time.perf_counter()
    print(
        f"{'packed' if packed else 'unpacked':8} {count:,} rows: made in {ready - start:.2f} s,"
        f" step 1,000,000 in {there - ready:.2f} s, then {tokens / (filled - there) / 1e6:.1f} M"
        f" tokens/s; widths {made.widths.tolist()}, padding {100 * made.padding:.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10**6)
    flags = parser.parse_args()
    show_packing(flags.count)
    for packed in (True, False):
        show_batches(flags.count, packed)


if __name__ == "__main__":
    main()
