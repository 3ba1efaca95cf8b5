# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost: the support example with a save every N steps and without, in turns; seconds and bytes.

    python tools/bench_save.py [--steps=60] [--every=20] [--pairs=2]

A save at the end is part of both. Compare the ratio: a machine's other work slows both alike.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(every: int, steps: int, folder: pathlib.Path) -> tuple[float, int]:
    """Seconds of training, and bytes of the newest checkpoint."""
    keys = {
        "checkpoint.every_steps": every,
        "checkpoint.every_minutes": 0.0,
        "steps": steps,
        "run_dir": folder,
        "validate.every_steps": steps,
        "validate.samples": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "jft.cli", "train", f"--config={ROOT / 'configs/support.py'}"]
    done = subprocess.run(
        [*command, *flags, "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    newest = folder / "checkpoints" / str(steps)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return json.loads(done.stdout)["train_seconds"], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=2)
    flags = parser.parse_args()
    ratios, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(flags.pairs):
            place = pathlib.Path(folder)
            # In turns, and the second pair the other way round: the first run of a machine is often the faster one.
            order = (flags.every, 0) if pair % 2 else (0, flags.every)
            seconds = {}
            for every in order:
                seconds[every], size = run(every, flags.steps, place / f"{pair}-{every}")
            ratios.append(seconds[flags.every] / seconds[0])
            print(
                f"{seconds[0]:.1f} s without, {seconds[flags.every]:.1f} s with: {ratios[-1]:.4f}"
            )
    print(f"median {statistics.median(ratios):.4f}; {size:,} bytes a checkpoint")


if __name__ == "__main__":
    main()
