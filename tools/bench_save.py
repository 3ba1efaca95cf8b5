# SPDX-License-Identifier: Apache-2.0
"""What saving costs: stretches of steps with a save and without, in turns, in one run.

    python tools/bench_save.py --config=configs/support.py --rounds=4

Each stretch is 20 steps. With a save, it begins at the stretch's start, so that all that goes on in the background falls
into the stretch. Reported: seconds of a step with and without, the difference, for how long a save held the loop, and the
bytes that it wrote.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax

from jft import checkpoints, jobs
from jft.verbs import parsing

STRETCH = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="stretches of each kind")
    config, _, rest = parsing.read_config(sys.argv[1:])
    flags = parser.parse_args(rest)
    with tempfile.TemporaryDirectory() as folder:
        job = jobs.prepare(config, pathlib.Path(folder))
        measure(job, pathlib.Path(folder), flags.rounds)
    return 0


def measure(job: jobs.Job, folder: pathlib.Path, rounds: int) -> None:
    saved = checkpoints.Checkpoints(folder / "checkpoints", 2)
    state, _ = stretch(job, job.first_state(), saved, save=True)  # compiles
    saved.wait()
    times: dict[bool, list[float]] = {False: [], True: []}
    held = []
    for turn in range(2 * rounds):
        save = bool((turn + turn // 2) % 2)  # without, with, with, without: a drift falls on both
        began = time.perf_counter()
        state, blocked = stretch(job, state, saved, save=save)
        saved.wait()
        times[save].append((time.perf_counter() - began) / STRETCH)
        held += [blocked] if save else []
    saved.close()
    newest = folder / "checkpoints" / str(saved.latest)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    without, with_save = (statistics.median(times[kind]) for kind in (False, True))
    for kind, name in ((False, "without"), (True, "with a save every 20 steps")):
        each = " ".join(f"{seconds:.3f}" for seconds in times[kind])
        print(f"{name}: {statistics.median(times[kind]):.4f} s a step ({each})")
    print(f"difference: {100 * (with_save / without - 1):+.2f} %")
    print(f"a save holds the loop for {statistics.median(held):.3f} s and writes {size:,} bytes")


def stretch(
    job: jobs.Job, state: Any, saved: checkpoints.Checkpoints, *, save: bool
) -> tuple[Any, float]:
    """20 steps as in the loop; the state, and for how long the save held it up."""
    first, before, blocked = int(state.step), None, 0.0
    if save:
        began = time.perf_counter()
        saved.save(state, {})
        blocked = time.perf_counter() - began
    for number in range(first, first + STRETCH):
        state, values = job.program.train_step(state, job.frozen, job.batch(number))
        jax.device_get(before)
        before = values
        saved.poll()
    jax.block_until_ready(state)
    return state, blocked


if __name__ == "__main__":
    sys.exit(main())
