# SPDX-License-Identifier: Apache-2.0
"""What a run came to: base against tuned on held-out examples, sizes, times, and where everything lies."""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from jft import generate, lora, models, runs, tree
from jft.data import encoding, examples
from jft.evals import scores

ANSWERS_AT_A_TIME = 24


def make(job: Any, state: Any, best: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Evaluates base and best, writes summary.json and samples.jsonl, and returns the summary.

    Args:
      job: of `jft.loop`.
      state: the last one.
      best: step and loss of the best validation; empty without a validation set.
      seconds: that training took.
    """
    name = "best" if best else "last"
    folder = job.folder / name
    result: dict[str, Any] = {
        "run": str(job.folder),
        "result": str(folder),
        "steps": int(state.step),
        "best_step": best.get("step"),
        "train_seconds": round(seconds, 1),
        "trained_parameters": tree.size(state.trainable),
        "total_parameters": tree.size(job.model.params),
        "result_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    began = time.perf_counter()
    if job.config.lora.rank:
        base = tuned = job.model
        adapters = tuned.load_adapter(folder)
        before, after = lora.neutral(adapters, tuned.params), adapters
    else:
        asked = job.config.model
        base = models.load(asked.path, dtype=asked.dtype, revision=asked.revision or None)
        tuned, adapters, _ = runs.open_result(folder)
        before, after = base.params, tuned.params
    # What is scored was read back from its files: it is what the user gets.
    if len(job.data.test_rows):
        result["base"] = {"loss": job.mean_loss(job.data.test_rows, before)}
        result["tuned"] = {"loss": job.mean_loss(job.data.test_rows, after)}
    samples = _answers(job, base, tuned, adapters)
    if samples:
        for which in ("base", "tuned"):
            result[which] |= _scores(samples, which, job.config.validate.format)
    result["answers"] = len(samples)
    result["examples"] = samples[:3]
    result["evaluation_seconds"] = round(time.perf_counter() - began, 1)
    result["peak_memory_gb"] = peak_memory()
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (job.folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    runs.write_json(job.folder / "summary.json", result)
    return result


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The summary of a finished run."""
    print(f"{folder} is a finished run (--fresh trains again); its summary:", file=sys.stderr)
    return runs.read_json(folder / "summary.json")


def _answers(
    job: Any, base: models.Model, tuned: models.Model, adapters: Any
) -> list[dict[str, Any]]:
    """Greedy answers of both to the test prompts."""
    c = job.config
    asked = job.data.test[: c.validate.samples]
    if not asked:
        return []
    sampling = generate.Sampling(max_new_tokens=c.validate.max_new_tokens)
    print(f"answering {len(asked)} held-out prompts, base and tuned", file=sys.stderr)
    tuned_generator = generate.Generator(tuned, adapters)
    if adapters:  # they need no other compiled program
        neutral = lora.neutral(adapters, base.params)
        base_generator = tuned_generator.with_adapters(neutral)
    else:
        base_generator = generate.Generator(base)
    texts = {
        which: answer(generator, asked, c.data.system, sampling)
        for which, generator in (("base", base_generator), ("tuned", tuned_generator))
    }
    return [
        {
            "prompt": e.messages[-2]["content"] if len(e.messages) > 1 else "",
            "reference": e.messages[-1]["content"] or json.dumps(e.messages[-1].get("tool_calls")),
            "base": base_text,
            "tuned": tuned_text,
        }
        for e, base_text, tuned_text in zip(asked, texts["base"], texts["tuned"], strict=True)
    ]


def answer(
    generator: generate.Generator,
    asked: Sequence[examples.Example],
    system: str,
    sampling: generate.Sampling,
) -> list[str]:
    """The generator's answers to the examples' last prompts, in their order."""
    tokenizer = generator.model.tokenizer
    prompts = [
        encoding.prompt_tokens(tokenizer, e.messages[:-1], system=system or None, tools=e.tools)
        for e in asked
    ]
    texts: list[str] = []
    width = max(map(len, prompts))
    for at in range(0, len(prompts), ANSWERS_AT_A_TIME):
        some = prompts[at : at + ANSWERS_AT_A_TIME]
        some += [some[0]] * (ANSWERS_AT_A_TIME - len(some))  # one shape, one compiled program
        texts += [generator.text(t) for t in generator.batch(some, sampling, width=width)]
    return texts[: len(prompts)]


def _scores(samples: list[dict[str, Any]], which: str, kind: str) -> dict[str, float]:
    exact = sum(scores.exact_match(s[which], s["reference"]) for s in samples)
    valid = sum(scores.valid_format(s[which], s["reference"], kind) for s in samples)
    found = {"exact_match": exact / len(samples)}
    return found | ({"valid_format": valid / len(samples)} if kind else {})


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def render(s: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [""]
    names = [k for k in ("exact_match", "valid_format", "loss") if k in s.get("tuned", {})]
    if names:
        lines.append(f"held-out set ({s['answers']} answers)      base     tuned")
        for name in names:
            shown = [
                f"{s[w][name]:9.3f}" if name == "loss" else f"{100 * s[w][name]:7.1f} %"
                for w in ("base", "tuned")
            ]
            lines.append(f"  {name.replace('_', ' '):<24} {shown[0]} {shown[1]}")
    for sample in s["examples"]:
        lines += ["", f"  prompt     {_line(sample['prompt'])}"]
        for which in ("reference", "base", "tuned"):
            lines.append(f"  {which:<10} {_line(sample[which])}")
    share = 100 * s["trained_parameters"] / s["total_parameters"]
    at_best = f", best at step {s['best_step']}" if s["best_step"] else ""
    lines += [
        "",
        f"trained     {s['trained_parameters']:,} of {s['total_parameters']:,} parameters ({share:.2f} %)",
        f"steps       {s['steps']}{at_best}; {s['train_seconds']:.0f} s training,"
        f" {s['evaluation_seconds']:.0f} s evaluation; peak memory {s['peak_memory_gb']:.1f} GB",
        f"result      {s['result']} ({s['result_bytes'] / 1e6:.1f} MB); metrics, samples and checkpoints"
        f" in {s['run']}",
        f"talk to it  jft generate --run={s['run']}",
    ]
    return "\n".join(lines)


def _line(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
