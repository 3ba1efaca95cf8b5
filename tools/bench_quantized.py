# SPDX-License-Identifier: Apache-2.0
"""Trains on a base of each format, with several seeds: losses, memory, speed; a Markdown table.

    python tools/bench_quantized.py [--config=configs/support.py] [--steps=60] [--seeds=3] [--kinds=none,nf4,int4,int8] [KEY=VALUE ...]

Each run is a process of its own, one after the other and the formats in turn, so that a busy machine slows them alike.
The base is SmolLM2-135M-Instruct's Q4_1 file, whose values are read as float32 and quantised again.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(
    config: str, changes: list[str], kind: str, seed: int, steps: int, folder: pathlib.Path
) -> dict[str, float]:
    """Validation loss at the end, tokens/s and the process's largest memory in GB."""
    keys = {
        "model.quantize": kind,
        "seed": seed,
        "steps": steps,
        "run_dir": folder / f"{kind}-{seed}",
        "validate.every_steps": steps,
        "validate.samples": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    flags += [f"--config.{change}" for change in changes]
    command = [sys.executable, "-m", "jft.cli", "train", f"--config={config}"]
    done = subprocess.run(
        [*command, *flags, "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(done.stdout)
    lines = (folder / f"{kind}-{seed}" / "metrics.jsonl").read_text().splitlines()
    losses = [one["valid_loss"] for one in map(json.loads, lines) if "valid_loss" in one]
    return {
        "loss": losses[-1],
        "tokens_per_second": found["speed"]["tokens_per_second"],
        "memory": found["peak_memory_gb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", default="none,nf4,int4,int8")
    parser.add_argument("--config", default=str(ROOT / "configs/support.py"))
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    flags = parser.parse_args()
    kinds = flags.kinds.split(",")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (kind, seed): run(
                flags.config, flags.changes, kind, seed, flags.steps, pathlib.Path(folder)
            )
            for seed in range(flags.seeds)
            for kind in kinds
        }
    first = kinds[0]
    print(
        "| base | validation loss, each seed | of the first's | tokens/s | GB |\n|---|---|---|---|---|"
    )
    for kind in kinds:
        own = [found[kind, seed] for seed in range(flags.seeds)]
        ratios = [one["loss"] / found[first, seed]["loss"] for seed, one in enumerate(own)]
        losses = ", ".join(format(one["loss"], ".4f") for one in own)
        speed = statistics.median(one["tokens_per_second"] for one in own)
        memory = max(one["memory"] for one in own)
        print(f"| {kind} | {losses} | {statistics.mean(ratios):.4f} | {speed:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
