# SPDX-License-Identifier: Apache-2.0
"""Greedy generation in float32 on this CPU: jft beside transformers and torch.

    python tools/bench_generate.py                         # beside torch where this Python has it, else jft alone
    python tools/bench_generate.py --torch_python PYTHON   # torch, transformers of another environment

Each contestant is a process that keeps the same weights loaded and answers the same prompts, as `Generator.batch` and
as transformers' `generate` do it, without a stop. They take turns, so that what disturbs the machine disturbs both:
trust the ratio, which is the median over turns of jft's speed by torch's in the same turn. The first call of each shape
is not timed: what it took longer than later ones is reported as the compile time. Decoding alone is what a run takes
more than a run for one new token, prefill. Peak memory is the process's, loading and smaller batches included.
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

TEXT = """The lighthouse keeper wrote down the weather every evening before he lit the lamp. On calm days a line was
enough: wind from the west, clear sky, two ships to the north. On other days he filled a page, because the sea had
done something that he had not seen before and he wished to be believed. His daughter read the pages in winter, when
the road was closed, and asked him what the ships had carried. He did not know. He knew how high their lamps hung
above the water, how long they took to pass the two rocks, and which of them blew a horn to greet him. So she made it
up: one had a cargo of clocks, all wrong by the same hour; another carried a library that belonged to a king who could
not read; the third was empty, and had been sent out only to see whether the lighthouse still stood where the charts
had it. Years later she found the harbour's own books, and with them what had really been in the ships. It was coal,
mostly, and salt, and once, in the year of the great storm, four hundred clocks."""

Result = dict[str, Any]


def main() -> None:
    flags = parse()
    if flags.worker:
        serve(JftWorker if flags.worker == "jft" else TorchWorker)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(flags, pathlib.Path(folder))
    if flags.json:
        settings = {
            key: value for key, value in vars(flags).items() if key not in ("json", "worker")
        }
        flags.json.write_text(json.dumps({"settings": settings, "results": results}) + "\n")
    bad = [r["batch"] for r in results if r.get("same_tokens", 1.0) < 0.5]
    if bad:
        sys.exit(f"batch {bad}: less than half of the tokens are the same: not one computation")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything jft loads")
    parser.add_argument("--torch_python", help="a Python with torch and transformers")
    parser.add_argument("--batches", default="1,8", help="rows at a time")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for each prompt")
    parser.add_argument("--turns", type=int, default=5, help="timed runs of each contestant")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch's")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    parser.add_argument("--worker", choices=("jft", "torch"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.new < 2 or flags.prompt < 1 or flags.turns < 1:
        parser.error("needs a prompt, a turn, and at least 2 new tokens")
    return flags


class Contestant:
    """A worker process that answers requests, each a line of JSON."""

    def __init__(self, name: str, python: str, **load: Any):
        self.name = name
        # Standard output is the channel; warnings stay visible on standard error.
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.info = self.ask(**load)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            sys.exit(f"{self.name} failed: see above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(worker: type) -> None:
    """Answers the requests on standard input until it ends; the first one loads the model."""
    channel, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not reach the channel
    loaded = worker(**json.loads(sys.stdin.readline()))
    answer: Any = loaded.info
    while True:
        print(json.dumps(answer), file=channel, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        start = time.perf_counter()
        rows = loaded.generate(request["prompts"], request["new"])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        answer = {"seconds": seconds, "rows": rows, "peak_rss_gb": peak}


class JftWorker:
    def __init__(self, model: str, export_to: str | None):
        import jax

        from jft import generate, models
        from jft.models import export

        self.generate_module = generate
        loaded = models.load(model, dtype="float32")
        if export_to:
            export.save(pathlib.Path(export_to), loaded.config, loaded.params, loaded.tokenizer)
        self.generator = generate.Generator(loaded)
        self.generator.stop = frozenset()
        ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        self.info = {"ids": list(ids), "versions": {"jax": jax.__version__}}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self.generator.batch(prompts, self.generate_module.Sampling(max_new_tokens=new))


class TorchWorker:
    def __init__(self, model: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(model, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        versions = {m.__name__: m.__version__ for m in (torch, transformers)}
        self.info = {"versions": versions, "threads": torch.get_num_threads()}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids_BT = self.torch.tensor(prompts)
        mask_BT = self.torch.ones_like(ids_BT)
        with self.torch.inference_mode():
            out_BT = self.model.generate(
                ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return out_BT[:, ids_BT.shape[1] :].tolist()


def torch_python(flags: argparse.Namespace) -> str | None:
    if flags.torch_python:
        return flags.torch_python
    probe = [sys.executable, "-c", "import torch, transformers"]
    found = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return sys.executable if found else None


def compare(flags: argparse.Namespace, folder: pathlib.Path) -> list[Result]:
    """Runs all batches and prints the table; the results in the order of the batches."""
    python = torch_python(flags)
    jft = Contestant(
        "jft", sys.executable, model=flags.model, export_to=str(folder) if python else None
    )
    contestants = [jft]
    if python:
        contestants.append(Contestant("torch", python, model=str(folder), threads=flags.threads))
    print(f"{flags.model}, float32, {len(os.sched_getaffinity(0))} cores,", end=" ")
    print(f"prompts of {flags.prompt} tokens, {flags.new} new")
    for contestant in contestants:
        print(f"{contestant.name}: {contestant.info['versions']}")
    results = []
    for batch in map(int, flags.batches.split(",")):
        prompts = prompts_of(jft.info["ids"], flags.prompt, batch)
        results.append(measure(contestants, prompts, flags) | {"batch": batch})
        report(results[-1], [contestant.name for contestant in contestants])
    for contestant in contestants:
        contestant.close()
    return results


def prompts_of(ids: list[int], length: int, batch: int) -> list[list[int]]:
    """Different prompts of one length: transformers would have to pad others."""
    starts = [7 * row for row in range(batch)]
    if starts[-1] + length > len(ids):
        sys.exit(f"the text has {len(ids)} tokens: too few for {batch} prompts of {length}")
    return [ids[start : start + length] for start in starts]


def measure(contestants: list[Contestant], prompts: Any, flags: argparse.Namespace) -> Result:
    """Warms up, then times every contestant once a turn: whole runs, and prefill with one token."""
    both = {"all": flags.new, "prefill": 1}
    first = {
        (c.name, part): c.ask(prompts=prompts, new=new)
        for c in contestants
        for part, new in both.items()
    }
    timed: dict[tuple[str, str], list[float]] = {key: [] for key in first}
    peak = {}
    for _ in range(flags.turns):
        for c in contestants:
            for part, new in both.items():
                answer = c.ask(prompts=prompts, new=new)
                timed[c.name, part].append(answer["seconds"])
                peak[c.name] = answer["peak_rss_gb"]
    result: Result = {}
    for name in peak:
        whole, prefill = timed[name, "all"], timed[name, "prefill"]
        warm_up = sum(first[name, part]["seconds"] for part in both)
        decode = [max(a - p, 1e-9) for a, p in zip(whole, prefill, strict=True)]
        result[name] = {
            "tokens_per_second": [len(prompts) * flags.new / t for t in whole],
            "decode_tokens_per_second": [len(prompts) * (flags.new - 1) / t for t in decode],
            "prefill_seconds": prefill,
            "compile_seconds": warm_up - statistics.median(whole) - statistics.median(prefill),
            "peak_rss_gb": peak[name],
        }
    if "torch" in result:
        for key in ("tokens_per_second", "decode_tokens_per_second"):
            pairs = zip(result["jft"][key], result["torch"][key], strict=True)
            result[f"ratio_{key}"] = [a / b for a, b in pairs]
        rows = (first[name, "all"]["rows"] for name in ("jft", "torch"))
        result["common_prefix"] = [common(a, b) for a, b in zip(*rows, strict=True)]
        result["same_tokens"] = sum(result["common_prefix"]) / (len(prompts) * flags.new)
    return result


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (x, y) in pairs if x != y), len(a))


def report(result: Result, names: list[str]) -> None:
    print(f"\nbatch {result['batch']}", end="")
    print(f"{'tokens/s':>15}{'decoding':>10}{'prefill s':>11}{'compile s':>11}{'peak GB':>9}")
    for name in names:
        r = result[name]
        speeds = [
            statistics.median(r[k]) for k in ("tokens_per_second", "decode_tokens_per_second")
        ]
        print(f"{name:<7}{speeds[0]:>15.1f}{speeds[1]:>10.1f}", end="")
        print(f"{statistics.median(r['prefill_seconds']):>11.3f}", end="")
        # torch compiles nothing: what its first calls took longer is not called so.
        compiled = f"{r['compile_seconds']:.1f}" if name == "jft" else ""
        print(f"{compiled:>11}{r['peak_rss_gb']:>9.2f}")
    if "common_prefix" in result:
        ratios = [result[f"ratio_{k}"] for k in ("tokens_per_second", "decode_tokens_per_second")]
        print(f"{'ratio':<7}{statistics.median(ratios[0]):>15.2f}", end="")
        print(f"{statistics.median(ratios[1]):>10.2f}", end="")
        print(f"   from {min(ratios[0]):.2f} to {max(ratios[0]):.2f} in {len(ratios[0])} turns")
        print(f"the same tokens from the start, row by row: {result['common_prefix']}")


if __name__ == "__main__":
    main()
