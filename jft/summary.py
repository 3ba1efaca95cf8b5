# SPDX-License-Identifier: Apache-2.0
"""What a run came to: base against tuned on held-out examples, sizes, times, and where everything lies."""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from jft import divergence, generate, hosts, jobs, lora, models, runs, tree
from jft.data import encoding, examples
from jft.evals import scores

ANSWERS_AT_A_TIME = 24


def make(
    job: jobs.Job,
    best: dict[str, Any],
    seconds: float,
    speed: dict[str, float],
    watch: divergence.Watch,
) -> dict[str, Any]:
    """Evaluates base and best, writes summary.json and samples.jsonl, and returns the summary.

    Every process calls it, when the results are written.

    Args:
      job: the run.
      best: step and loss of the best validation; empty without a validation set.
      seconds: that training took.
      speed: of the median step.
      watch: over the loss.
    """
    folder = job.folder / ("best" if best else "last")
    result: dict[str, Any] = {
        "run": str(job.folder),
        "result": str(folder),
        "steps": job.steps,
        "best_step": best.get("step"),
        "skipped_steps": watch.skipped,
        "loss_spikes": watch.spikes,
        "train_seconds": round(seconds, 1),
        "speed": speed,
        "trained_parameters": tree.size(job.trainable),
        "total_parameters": tree.size(job.model.params),
        "result_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    began = time.perf_counter()
    found = _adapted(job, folder) if job.config.lora.rank else _whole(job, folder)
    samples = _samples(job, found)
    for which, (loss, _) in found.items():
        if loss is not None:
            result[which] = {"loss": loss}
        if samples:
            own = _scores(samples, which, job.config.validate.format)
            result[which] = result.get(which, {}) | own
    result["answers"] = len(samples)
    result["examples"] = samples[:3]
    result["evaluation_seconds"] = round(time.perf_counter() - began, 1)
    result |= _peaks()
    if hosts.lead():
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (job.folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        runs.write_json(job.folder / "summary.json", result)
    return result


# Of base and tuned: the loss on the test rows (None without any) and the answers.
Found = dict[str, tuple[float | None, list[str]]]


def _adapted(job: jobs.Job, folder: pathlib.Path) -> Found:
    """Base against tuned where both are one model; the adapter is read back from its files: it is what the user gets."""
    adapters = job.load_adapter(folder)
    neutral = lora.neutral(adapters, job.model.params)
    tuned = generate.Generator(job.model, adapters)
    base = tuned.with_adapters(neutral)  # needs no other compiled program
    return {
        "base": (_loss(job, neutral), _answers(job, base)),
        "tuned": (_loss(job, adapters), _answers(job, tuned)),
    }


def _whole(job: jobs.Job, folder: pathlib.Path) -> Found:
    """Likewise of two models, one after the other in memory; the tuned one read back."""

    def of(model: models.Model) -> tuple[float | None, list[str]]:
        return _loss(job, model.params), _answers(job, generate.Generator(model))

    asked, shardings = job.config.model, job.shardings
    revision = asked.revision or None
    base = of(models.load(asked.path, dtype=asked.dtype, revision=revision, shardings=shardings))
    return {"base": base, "tuned": of(runs.open_result(folder, shardings=shardings)[0])}


def _loss(job: jobs.Job, trainable: Any) -> float | None:
    return job.mean_loss(job.data.test_rows, trainable) if len(job.data.test_rows) else None


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The summary of a finished run."""
    if hosts.lead():
        print(f"{folder} is a finished run (--fresh trains again); its summary:", file=sys.stderr)
    return runs.read_json(folder / "summary.json")


def _asked(job: jobs.Job) -> Sequence[examples.Example]:
    return job.data.test[: job.config.validate.samples]


def _answers(job: jobs.Job, generator: generate.Generator) -> list[str]:
    """Greedy answers to the test prompts."""
    c, asked = job.config, _asked(job)
    if not asked:
        return []
    if hosts.lead():
        print(f"answering {len(asked)} held-out prompts", file=sys.stderr)
    sampling = generate.Sampling(max_new_tokens=c.validate.max_new_tokens)
    return answer(generator, asked, c.data.system, sampling)


def _samples(job: jobs.Job, found: Found) -> list[dict[str, Any]]:
    """What samples.jsonl holds."""
    texts = (found[which][1] for which in ("base", "tuned"))
    return [
        {
            "prompt": e.messages[-2]["content"] if len(e.messages) > 1 else "",
            "reference": e.messages[-1]["content"] or json.dumps(e.messages[-1].get("tool_calls")),
            "base": base,
            "tuned": tuned,
        }
        for e, base, tuned in zip(_asked(job), *texts, strict=True)
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


def _peaks() -> dict[str, float]:
    """The most memory taken so far, in GB (10^9 bytes): by this process, and on its fullest device where that tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"peak_memory_gb": round(own / 1e9, 2)}
    told = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    if all(told):
        peaks["peak_device_memory_gb"] = round(max(told) / 1e9, 2)
    return peaks


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
        f" {s['evaluation_seconds']:.0f} s evaluation",
        *_trouble(s),
        *_measured(s),
        f"result      {s['result']} ({s['result_bytes'] / 1e6:.1f} MB); metrics, samples and checkpoints"
        f" in {s['run']}",
        f"talk to it  jft generate --run={s['run']}",
    ]
    return "\n".join(lines)


def _trouble(s: dict[str, Any]) -> list[str]:
    """What went wrong on the way, if anything did; runs of earlier versions did not count it."""
    counts = {
        "skipped steps (loss or gradient not finite)": s.get("skipped_steps"),
        "spikes of the loss": s.get("loss_spikes"),
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"trouble     {', '.join(told)}"] if told else []


def _measured(s: dict[str, Any]) -> list[str]:
    """Speed and memory; a run that was resumed at its end, or has one step, has no speed."""
    speed, lines = s.get("speed"), []
    if speed:
        used = f", {100 * speed['mfu']:.1f} % of the device's peak" if "mfu" in speed else ""
        lines.append(
            f"speed       {speed['tokens_per_second']:,.0f} tokens/s,"
            f" {speed['tokens_per_second_per_device']:,.0f} a device; {speed['step_seconds']:.3f} s a step{used}"
        )
    device = s.get("peak_device_memory_gb")
    on_device = "" if device is None else f", {device:.1f} GB on a device"
    return [*lines, f"memory      {s['peak_memory_gb']:.1f} GB{on_device}, at most"]


def _line(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
