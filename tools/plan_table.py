# SPDX-License-Identifier: Apache-2.0
"""Compiles the runs of docs/plan-table.md and writes that page.

    python tools/plan_table.py [--only=REGEX] [--again] [--budget=SECONDS]

Each finished row is a line of docs/plan-table.jsonl, so that an interrupted run goes on where it stopped, and rows for
machines of which each environment has only one compiler (libtpu, JAX's CUDA plugin) come together. `--again` compiles
rows that are there already. Nothing is loaded and no such machine is needed; a row takes 25 to 60 s on two idle cores.

`--gate` compiles the rows marked with a star and compares them with the committed ones: at most 2 % more memory and 1 %
more operations.
"""

import argparse
import dataclasses
import inspect
import json
import pathlib
import re
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS, PAGE = ROOT / "docs" / "plan-table.jsonl", ROOT / "docs" / "plan-table.md"
MORE_MEMORY, MORE_FLOPS = 1.02, 1.01  # releases of a compiler differ; so do not our own changes


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the table: one row of `length` tokens on each device, rank 16, bfloat16, unless it says otherwise.

    Attributes:
      changes: keys of the configuration that differ.
      rows: of a batch, for each device.
      formed: W + scale * A B is formed, to compare with.
      gate: whether the gate compiles it.
    """

    name: str
    topology: str
    model: str = "llama3.1-8b"
    length: int = 2048
    rows: int = 1
    changes: tuple[tuple[str, str], ...] = (("remat", "full"),)
    formed: bool = False
    gate: bool = False

    @property
    def settings(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.changes)


FULL = (("remat", "full"),)
PRODUCTS = (("remat", "products"),)
WHOLE = (("lora.rank", "0"), *FULL)
NF4 = (("model.quantize", "nf4"),)
NF4_OFFLOAD = (*NF4, ("remat", "offload"))
NF4_INT8 = (*NF4, ("model.quantize_embeddings", "int8"))
RUNS = (
    Run("8B LoRA", "v5e:4x4", gate=True),
    Run("8B LoRA, the fastest that fits", "v5e:4x4", changes=PRODUCTS, gate=True),
    Run("8B LoRA, 8,192 a row", "v5e:4x4", length=8192),
    Run(
        "8B LoRA, 8,192 a row",
        "v5e:4x4",
        length=8192,
        changes=(("remat", "offload_attention"),),
        gate=True,
    ),
    Run("8B full fine-tuning", "v5e:4x4", changes=WHOLE, gate=True),
    Run("70B LoRA", "v5e:4x4", model="llama3.1-70b"),
    Run("70B LoRA", "v5e:4x4", model="llama3.1-70b", changes=(("remat", "offload"),)),
    Run("8B LoRA, 2 rows", "h100:1", rows=2),
    Run("8B LoRA, 2 rows, one at a time", "h100:1", rows=2, changes=(*FULL, ("micro_batch", "1"))),
    Run("8B LoRA, 2 rows, the fastest that fits", "h100:1", rows=2, changes=PRODUCTS),
    Run("8B LoRA, tensor 4", "v5e:4x4", changes=(*FULL, ("mesh.tensor", "4"))),
    Run("8B LoRA", "v6e:4x4"),
    Run("8B full fine-tuning", "v6e:4x4", changes=WHOLE),
    Run("8B LoRA", "v5p:2x2x4"),
    Run("8B full fine-tuning", "v5p:2x2x4", changes=WHOLE),
    Run("8B LoRA", "tpu7x:2x2x2"),
    Run("8B full fine-tuning", "tpu7x:2x2x2", changes=WHOLE),
    Run("8B LoRA, two slices", "2*v5e:4x4"),
    Run("8B LoRA, W + AB formed, to compare with", "v5e:4x4", formed=True),
    Run("8B NF4", "v5e:4x4", changes=(*NF4, *FULL), gate=True),
    Run("8B NF4", "v5e:1x1", changes=(*NF4, *FULL)),
    Run("8B NF4", "v5e:1x1", changes=NF4_OFFLOAD),
    Run("8B NF4", "v5e:1x1", changes=(*NF4_INT8, *FULL)),
    Run("8B NF4, 16,384 a row", "v5e:1x1", length=16384, changes=NF4_OFFLOAD),
    Run("8B NF4, 32,768 a row", "v5e:1x1", length=32768, changes=(*NF4_INT8, ("remat", "offload"))),
    Run("70B NF4", "v5e:4x4", model="llama3.1-70b", changes=(*NF4, *FULL)),
    Run("70B NF4", "v5e:2x4", model="llama3.1-70b", changes=NF4_OFFLOAD),
    Run("8B NF4, 2 rows", "h100:1", rows=2, changes=(*NF4, *FULL)),
    Run(
        "8B NF4, 2 rows, one at a time",
        "h100:1",
        rows=2,
        changes=(*NF4, *FULL, ("micro_batch", "1")),
    ),
    Run("70B NF4", "h100:1", model="llama3.1-70b", changes=(*NF4, *FULL)),
)


def compile_row(run: Run) -> dict[str, Any]:
    """What the table says of a run.

    Raises:
      UserError: this environment has no compiler for it.
    """
    from jft import config as configuration
    from jft.models import families
    from jft.plan import compiled, hlo_collectives, topology

    on = topology.parse(run.topology)
    c = configuration.base()
    c.model.dtype, c.data.max_length, c.batch_size = "bfloat16", run.length, 1
    c.batch_size = run.rows * len(on.devices)
    for key, text in run.changes:
        configuration.override(c, key, text)
    own = compiled.setting(c, families.preset(run.model), on)
    if run.formed:
        form(own)
    step = compiled.compile_step(own, compiled.TRAIN, say=print_progress)
    result = compiled.Result(own, step, None)
    memory, analysis = step.memory, step.analysis
    assert memory is not None and analysis is not None
    estimate = result.estimate()
    assert estimate is not None
    exchanged = hlo_collectives.by_kind_and_axes(analysis.collectives)
    return {
        "name": run.name,
        "topology": run.topology,
        "length": run.length,
        "rows": run.rows,
        "settings": run.settings,
        "fits": step.fits(),
        "peak_bytes": memory.peak,
        "argument_bytes": memory.arguments,
        "host_bytes": step.host_bytes,
        "flops": analysis.flops.total,
        "ideal_flops": result.ideal_flops,
        "uncounted": list(analysis.flops.uncounted),
        "collective_bytes": {
            f"{kind} {'+'.join(axes)}": n for (kind, axes), n in exchanged.items()
        },
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second_per_device,
        "compile_seconds": round(step.seconds, 1),
        "compiler": compiler(on.chip.platform),
    }


def form(own: Any) -> None:
    """Gives the setting a training step that forms W + scale * A B, and differentiates that."""
    from jft import lora, step
    from jft.models import decoder

    whole = step.full_loss(
        own.model,
        how=decoder.Execution(remat="full", attention="splash", layout=own.program.layout),
        chunk=256,
    )

    def loss(adapters: Any, params: Any, batch: Any) -> Any:
        return whole(lora.add(params, adapters), {}, batch)

    built = own.program
    state = built.state
    import jax

    shardings = jax.tree.map(lambda x: x.sharding, state)
    made = step.train_step(loss, built.optimizer, shardings=shardings)
    object.__setattr__(built, "train_step", made)


def compiler(platform: str) -> str:
    import importlib.metadata

    package = "libtpu" if platform == "tpu" else "jax-cuda12-plugin"
    jax = importlib.metadata.version("jax")
    return f"jax {jax}, {package} {importlib.metadata.version(package)}"


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def key(row: Any) -> tuple[str, str, str]:
    return row["name"], row["topology"], row["settings"]


def read() -> dict[tuple[str, str, str], dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def page(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The Markdown page."""
    head = inspect.cleandoc(
        """
        # What runs take, compiled ahead

        Llama 3.1 of 8B and 70B parameters, LoRA of rank 16 on all linear layers or full fine-tuning; the base in bfloat16, adapters and their
        moments (in full fine-tuning the weights) in float32; one row of 2,048 tokens on each device unless the row says otherwise.
        `tools/plan_table.py` compiles the training steps with the real compilers and writes this page; nothing was run. `jft plan` gives
        the same for a configuration of yours.

        Peak and arguments are GB (10^9 bytes) on one device, `host` what waits in its host's memory. Executed operations are counted in the optimised program
        (loops times their trips, recomputation and kernels included) and divided by the ideal ones: 2 N forward and 2 N backward for each token (6 N
        where all weights train), N all parameters. Exchanged are GB that a device sends. Tokens/s are a roofline's (see [plan.md](plan.md)), not measured. Seconds to compile are of a machine
        with two cores that had other work; 0 where they were not taken.
        """
    )
    lines = [
        head,
        "",
        "| run | devices | settings | peak | arguments | host | executed / ideal | exchanged | tokens/s a device | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        row = rows.get((run.name, run.topology, run.settings))
        if row is None:
            lines.append(
                f"| {run.name} | {run.topology} | {run.settings} | not compiled | | | | | | |"
            )
            continue
        sent = sum(row["collective_bytes"].values()) / 1e9
        fits = "" if row["fits"] else " (does not fit)"
        lines.append(
            f"| {run.name}{' *' if run.gate else ''} | {run.topology} | {run.settings} | {row['peak_bytes'] / 1e9:.2f}{fits}"
            f" | {row['argument_bytes'] / 1e9:.2f} | {row['host_bytes'] / 1e9:.2f}"
            f" | {row['flops'] / row['ideal_flops']:.3f} | {sent:.1f} | {row['tokens_per_second']:,.0f}"
            f" | {row['compile_seconds']:.0f} s |"
        )
    compilers = sorted({row["compiler"] for row in rows.values()})
    return "\n".join(
        [
            *lines,
            "",
            f"Compilers: {'; '.join(compilers)}. Rows with a star are compiled again in CI.",
            "",
        ]
    )


def save(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    PAGE.write_text(page(rows))


def gate(rows: dict[tuple[str, str, str], dict[str, Any]]) -> int:
    """Compiles the starred rows; the number of those that became worse."""
    worse = 0
    for run in (run for run in RUNS if run.gate):
        before, now = rows[run.name, run.topology, run.settings], compile_row(run)
        for what, most in (("peak_bytes", MORE_MEMORY), ("flops", MORE_FLOPS)):
            ratio = now[what] / before[what]
            bad = ratio > most
            worse += bad
            print(
                f"{'WORSE' if bad else 'ok':<6}{run.name} ({run.topology}, {run.settings}): {what}"
                f" {now[what]:.4g}, {ratio:.4f} of the committed one (at most {most})"
            )
    if worse:
        print(
            "if it has to be so: python tools/plan_table.py --again, and commit docs/plan-table.*"
        )
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression over name and topology")
    parser.add_argument("--again", action="store_true", help="compile rows that are there too")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds to begin rows in"
    )
    parser.add_argument("--gate", action="store_true", help="compare the starred rows")
    flags = parser.parse_args()
    from jft import errors

    rows, began = read(), time.time()
    if flags.gate:
        return min(gate(rows), 1)
    for run in RUNS:
        name = f"{run.name} {run.topology} {run.settings}"
        known = (run.name, run.topology, run.settings) in rows and not flags.again
        if known or not re.search(flags.only, name) or time.time() - began > flags.budget:
            continue
        try:
            row = compile_row(run)
        except errors.UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        rows[key(row)] = row
        save(rows)
        print(f"{name}: {row['peak_bytes'] / 1e9:.2f} GB, {row['flops'] / row['ideal_flops']:.3f}")
    save(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
