# SPDX-License-Identifier: Apache-2.0
"""LoRA and full fine-tuning of SmolLM2-135M on this CPU: jft beside TRL and a bare torch + PEFT loop.

    python tools/bench_cpu.py --data dolly.jsonl                         # jft alone
    python tools/bench_cpu.py --data dolly.jsonl --torch_python PYTHON   # beside torch, in that environment

The same encoded rows (r 16 on all linear layers, batch 8, length 256) go to every contestant. Contestants take turns,
each run in a process of its own, so that what disturbs the machine disturbs all of them; compare the ratios.
Reported: median step seconds, real (not padding) tokens per second, peak resident GB, seconds to the first step.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH, LENGTH, RANK = 8, 256, 16
TORCH_KINDS = ("trl", "trl-packed", "bare", "bare-packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="JSONL with prompt and response")
    parser.add_argument("--torch_python", help="a Python with torch, transformers, peft and trl")
    parser.add_argument("--kinds", default="trl,bare,bare-packed", help=f"of {TORCH_KINDS}")
    parser.add_argument("--mode", default="lora", choices=("lora", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before")
    parser.add_argument("--micro_batch", type=int, default=2, help="rows at a time in jft")
    parser.add_argument("--worker", nargs=2, metavar=("ROWS", "OUT"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        pathlib.Path(flags.worker[1]).write_text(json.dumps(run_jft(flags, flags.worker[0])))
        return
    if not flags.data:
        parser.error("--data is required")
    with tempfile.TemporaryDirectory() as folder:
        compare(flags, pathlib.Path(folder))


def compare(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """Runs all contestants in turns and prints the table."""
    prepare(flags, folder)
    contestants = ["jft", *(flags.kinds.split(",") if flags.torch_python else [])]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for turn in range(flags.rounds):
        for name in contestants:
            out = folder / f"{name}-{turn}.json"
            command = command_of(name, flags, folder, out)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(out.read_text()))
            print(
                f"turn {turn + 1}, {name}: {results[name][-1]['real_tokens_per_second']:.0f} tokens/s"
            )
    print(f"\n{flags.mode}, {flags.dtype}, {os.cpu_count()} cores")
    print(f"{'':<14}{'s/step':>8}{'tokens/s':>10}{'GB':>7}{'first s':>9}{'jft is':>9}")
    ours = best(results["jft"])["real_tokens_per_second"]
    for name, runs in results.items():
        b = best(runs)
        speed = b["real_tokens_per_second"]
        print(
            f"{name:<14}{b['median_step_seconds']:>8.2f}{speed:>10.0f}{b['peak_rss_gb']:>7.1f}"
            f"{b['first_step_seconds']:>9.1f}{ours / speed:>8.2f}x"
        )


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The turn that was disturbed least."""
    return max(runs, key=lambda run: run["real_tokens_per_second"])


def command_of(
    name: str, flags: argparse.Namespace, folder: pathlib.Path, out: pathlib.Path
) -> list[str]:
    common = ["--mode", flags.mode, "--dtype", flags.dtype]
    common += ["--steps", str(flags.steps), "--warmup", str(flags.warmup)]
    if name == "jft":
        own = [
            "--worker",
            str(folder / "rows.npz"),
            str(out),
            "--micro_batch",
            str(flags.micro_batch),
        ]
        return [sys.executable, __file__, *common, *own]
    return [
        flags.torch_python,
        str(ROOT / "tools" / "bench_torch.py"),
        *("--kind", name, *common),
        *("--model", str(folder / "model"), "--rows-npz", str(folder / "rows.npz")),
        *("--json", str(out)),
        "--no-trl-checkpointing",  # nothing is recomputed in any contestant: TRL is faster so
    ]


def prepare(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """The encoded rows as one file, and the model as a folder that transformers reads."""
    import numpy as np

    from jft import models
    from jft.data import encoding, fitting, formats
    from jft.data import rows as rows_of
    from jft.models import export

    model = models.load("smollm2-135m-instruct")
    examples = formats.read(flags.data)
    encoder = encoding.Encoder(model.tokenizer)
    encoded = rows_of.InMemory([row for e in examples for row in encoder.one(e)])
    fitted, _ = fitting.fit(encoded, LENGTH - 1, "drop")
    rows = [fitted[i] for i in range(len(fitted))]
    np.savez(
        folder / "rows.npz",
        tokens=np.concatenate([row.tokens for row in rows]),
        lengths=np.array([len(row.tokens) for row in rows], np.int32),
        trained=np.concatenate([row.trained for row in rows]),
    )
    print(f"{len(rows)} of {len(examples)} rows have at most {LENGTH} tokens")
    if flags.torch_python:
        export.save(folder / "model", model.config, model.params, model.tokenizer)


def run_jft(flags: argparse.Namespace, path: str) -> dict[str, Any]:
    """One turn of jft: the loop's own train step over packed rows."""
    began = time.perf_counter()
    import jax
    import numpy as np

    from jft import lora, matmul, models, optim, step
    from jft.data import batches
    from jft.data import rows as rows_of
    from jft.models import architecture

    stored = np.load(path)
    ends = np.cumsum(stored["lengths"])[:-1]
    pieces = zip(np.split(stored["tokens"], ends), np.split(stored["trained"], ends), strict=True)
    rows = [rows_of.Row(ids, trained, f"row {i}") for i, (ids, trained) in enumerate(pieces)]
    plan = batches.Batches([rows_of.InMemory(rows)], batch_size=BATCH, length=LENGTH, seed=0)
    stored = flags.dtype if flags.mode == "lora" else "float32"
    model = models.load("smollm2-135m-instruct", dtype=stored)
    if flags.mode == "lora":
        spec = lora.Spec(
            rank=RANK, alpha=2.0 * RANK, targets=r"layers/.*/kernel", layouts=architecture.LAYOUTS
        )
        trainable, frozen = lora.init(spec, model.params, key=jax.random.key(0)), model.params
        loss = step.lora_loss(model.config, mode="merged")
    else:
        einsum = matmul.for_training("cpu")
        loss = step.full_loss(model.config, dtype=flags.dtype, einsum=einsum)
        trainable, frozen = model.params, {}
    del model
    optimizer = optim.optimizer(optim.Optim(), 1000)
    update = step.train_step(loss, optimizer, accumulate=BATCH // flags.micro_batch)
    state = step.init_state(trainable, optimizer)
    del trainable
    seconds, tokens, first, losses = [], 0, 0.0, []
    for i in range(flags.warmup + flags.steps):
        batch = plan.batch(i)
        start = time.perf_counter()
        state, metrics = update(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            first = time.perf_counter() - began
        if i >= flags.warmup:
            seconds.append(time.perf_counter() - start)
            # A row's last token is no input here; the other contestants count it too.
            tokens += int(np.count_nonzero(batch["segments"])) + int(
                batch["segments"].max(axis=1).sum()
            )
    return {
        "median_step_seconds": statistics.median(seconds),
        "real_tokens_per_second": tokens / sum(seconds),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "first_step_seconds": first,
        "losses": losses,
    }


if __name__ == "__main__":
    main()
