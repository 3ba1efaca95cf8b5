# SPDX-License-Identifier: Apache-2.0
"""The torch half of the CPU benchmark: the same fine-tuning with TRL, or with a plain torch loop.

`trl` is SFTTrainer with its own defaults (activations recomputed), `trl-packed` adds packing;
`bare` is a plain loop over transformers and PEFT, padded to a batch's longest row; `bare-packed`
packs rows into 256 tokens, attention within each example. Unpacked kinds take the rows in the same
order. bfloat16: autocast, float32 for whatever trains, a bfloat16 base under LoRA.

    pip install torch transformers peft trl gguf
    python tools/bench_torch.py --kind trl --mode lora --dtype float32 --model M.gguf \\
        --rows-npz rows.npz --steps 20 --warmup 3 --json trl.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import peft
import psutil
import torch
import transformers

KINDS = ("trl", "trl-packed", "bare", "bare-packed")
RATE, IGNORED = 2e-4, -100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}

Row = tuple[list[int], list[bool]]  # tokens, and which of them are trained


@dataclasses.dataclass
class Meter:
    """The time at the end of each step; real tokens and shape of each batch in the order drawn."""

    ends: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    batches: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)

    def report(self, warmup: int) -> dict[str, Any]:
        seconds = np.diff([psutil.Process().create_time(), *self.ends])
        timed = slice(warmup, len(seconds))
        tokens = sum(count for count, _ in self.batches[timed])
        return {
            "median_step_seconds": float(np.median(seconds[timed])),
            "real_tokens_per_second": tokens / float(seconds[timed].sum()),
            "first_step_seconds": float(seconds[0]),  # imports and loading included
            "step_seconds": seconds.round(4).tolist(),
            "tokens_and_shapes": self.batches[: len(seconds)],
            "losses": self.losses,
        }


def read_rows(args: argparse.Namespace) -> list[Row]:
    """Rows from an npz (tokens, lengths, trained); else prompt + response + end token of --data."""
    if args.rows_npz is not None:
        with np.load(args.rows_npz) as z:
            stops = np.cumsum(z["lengths"])[:-1]
            parts = [np.split(z[name], stops) for name in ("tokens", "trained")]
        return [(t.tolist(), m.astype(bool).tolist()) for t, m in zip(*parts, strict=True)]
    encode = transformers.AutoTokenizer.from_pretrained(**source(args.model))
    rows = []
    with args.data.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            prompt = encode(record["prompt"])["input_ids"]
            response = [*encode(record["response"])["input_ids"], encode.eos_token_id]
            rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return rows


def pack(rows: list[Row], capacity: int) -> list[list[Row]]:
    """Best fit, longest first: each row goes to the fullest bin that still has room."""
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        fits = (i for i, space in enumerate(room) if space >= len(row[0]))
        best = min(fits, key=room.__getitem__, default=len(bins))
        if best == len(bins):
            bins.append([])
            room.append(capacity)
        bins[best].append(row)
        room[best] -= len(row[0])
    return bins


def stack(bins: list[list[Row]], length: int) -> dict[str, torch.Tensor]:
    """Lays out bins of one or more rows; `segments` numbers the rows of a bin, 0 is padding."""
    shape = (len(bins), length)
    labels = torch.full(shape, IGNORED)
    ids, segments, positions = torch.zeros(3, *shape, dtype=torch.int64)
    for b, rows in enumerate(bins):
        start = 0
        for number, (tokens, trained) in enumerate(rows, 1):
            here = slice(start, start + len(tokens))
            ids[b, here], segments[b, here] = torch.tensor(tokens), number
            positions[b, here] = torch.arange(len(tokens))
            labels[b, here] = torch.where(torch.tensor(trained), ids[b, here], IGNORED)
            labels[b, start] = IGNORED  # the row before would predict it
            start += len(tokens)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "segments": segments}


def bare_batches(args: argparse.Namespace, rows: list[Row]) -> Iterator[dict]:
    """Yields batches for ever, as keyword arguments of the model and `segments`."""
    packed = args.kind == "bare-packed"
    bins = pack(rows, args.max_length) if packed else [[row] for row in rows]
    while True:
        for first in range(0, len(bins) - args.batch + 1, args.batch):
            chosen = bins[first : first + args.batch]
            longest = max(len(row[0]) for bin_ in chosen for row in bin_)
            batch = stack(chosen, args.max_length if packed else longest)
            mask = batch["segments"] > 0
            if packed:  # [B, 1, T, T], True where attention is allowed
                same = batch["segments"][:, None, :, None] == batch["segments"][:, None, None, :]
                mask = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
            yield batch | {"attention_mask": mask}


def source(path: pathlib.Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def load_model(args: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if args.dtype == "bfloat16" and args.mode == "lora" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(**source(args.model), dtype=dtype)
    model.is_quantized = False  # a GGUF is dequantised by now, yet TRL would refuse to train it
    return model


def run_bare(
    args: argparse.Namespace, model: Any, lora: Any, rows: list[Row], meter: Meter
) -> None:
    if lora is not None:
        model = peft.get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for _, batch in zip(range(args.steps), bare_batches(args, rows), strict=False):
        real = int((batch.pop("segments") > 0).sum())
        meter.batches.append((real, list(batch["labels"].shape)))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.losses.append(loss.item())
        meter.ends.append(time.time())


def run_trl(args: argparse.Namespace, model: Any, lora: Any, rows: list[Row], meter: Meter) -> None:
    import datasets  # TRL's imports take seconds, which the bare kinds do not owe
    import trl

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.ends.append(time.time())

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        real = sum(len(example["input_ids"]) for example in examples)
        meter.batches.append((real, list(batch["labels"].shape)))
        return batch

    masks = [[int(t) for t in trained] for _, trained in rows]
    data = {"input_ids": [tokens for tokens, _ in rows], "completion_mask": masks}
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch,
            max_length=args.max_length,
            max_steps=args.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            completion_only_loss=True,
            packing=args.kind == "trl-packed",
            gradient_checkpointing=not args.no_trl_checkpointing,
            bf16=args.dtype == "bfloat16",
            train_sampling_strategy="sequential",  # the other kinds' order
            use_cpu=True,
            dataloader_drop_last=True,
            **QUIET,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_dict(data),
            processing_class=transformers.AutoTokenizer.from_pretrained(**source(args.model)),
            peft_config=lora,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator
        trainer.data_collator = counted  # set here: the constructor refuses one with packing
        trainer.train()
    meter.losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="HF folder or .gguf")
    parser.add_argument("--rows-npz", type=pathlib.Path, help="tokens, lengths, trained")
    parser.add_argument("--data", type=pathlib.Path, help="JSON lines, where no rows are given")
    numbers = {"steps": 20, "warmup": 3, "batch": 8, "max-length": 256, "threads": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    parser.add_argument("--no-trl-checkpointing", action="store_true", help="TRL's default is on")
    args = parser.parse_args()
    if args.steps <= args.warmup or not (args.rows_npz or args.data):
        parser.error("needs more steps than warm-up, and --rows-npz or --data")
    return args


def main() -> None:
    args, meter = parse(), Meter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    every = read_rows(args)
    rows = [row for row in every if len(row[0]) <= args.max_length]
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    run = run_trl if args.kind.startswith("trl") else run_bare
    run(args, load_model(args), lora if args.mode == "lora" else None, rows, meter)
    result = vars(args) | {"rows": len(rows), "rows_too_long": len(every) - len(rows)}
    result |= meter.report(args.warmup)
    result["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps(result, default=str)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
