# SPDX-License-Identifier: Apache-2.0
"""Memory and start-up of large data: a file of so many gigabytes tokenised, checked and split, then opened again.

    python tools/bench_data.py FILE.jsonl                  # its words in other rows, 2 GB of them: 20 minutes
    python tools/bench_data.py FILE.jsonl --gigabytes=0.1  # a minute

Each turn is a process of its own. Memory is what a process holds apart from mapped files (RssAnon), sampled ten times a
second, since pages of a memory map are the system's to take back.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a JSONL file of prompt/response rows")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--turn", choices=["load"], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.turn:
        load(flags.data, flags.model)
        return
    from jft import models

    models.load_tokenizer(flags.model)  # fetched before the clock runs
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder, "cache")
        for sizes in (flags.gigabytes / 20, flags.gigabytes):
            path = pathlib.Path(folder, f"{sizes:g}.jsonl")
            rows = write(path, pathlib.Path(flags.data), int(sizes * 1e9))
            print(f"{path.stat().st_size / 1e9:.2f} GB, {rows:,} rows", flush=True)
            for what in ("first", "again"):
                print(f"  {what}:", flush=True)
                turn(path, flags.model, cache)


def write(path: pathlib.Path, source: pathlib.Path, size: int) -> int:
    """Rows of the source's own words, in runs of twenty from anywhere in it: no two rows are alike."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]
    words = " ".join(str(value) for row in rows for value in row.values()).split(" ")
    draw, count = random.Random(0), 0

    def text(runs: int) -> str:
        starts = (draw.randrange(len(words) - 20) for _ in range(runs))
        return " ".join(" ".join(words[at : at + 20]) for at in starts)

    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            made = {"prompt": text(draw.randint(1, 8)), "response": text(draw.randint(1, 6))}
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            count += 1
    return count


def turn(path: pathlib.Path, model: str, cache: pathlib.Path) -> None:
    command = [sys.executable, __file__, str(path), "--turn=load", f"--model={model}"]
    # The models' own cache is beside the rows' and is not moved.
    done = subprocess.run(command, env=os.environ | {"BENCH_CACHE": str(cache)})
    if done.returncode:
        sys.exit(done.returncode)


def load(path: str, model: str) -> None:
    """Opens the data as a run does, and reads a few batches."""
    from jft import models
    from jft.data import batches, encoding, formats, tokenised
    from jft.data import load as loading

    tokenised.cache_folder = lambda: pathlib.Path(os.environ["BENCH_CACHE"])
    tokenizer = models.load_tokenizer(model)
    before, peak = anonymous(), Peak()
    began = time.perf_counter()

    def tell(what: str) -> None:
        told = f"{time.perf_counter() - began:8.2f} s, {(peak.most - before) / 1e6:4.0f} MB more than before"
        print(f"    {what:<32} {told}", flush=True)

    source = loading.Source(path, max_length=2048, overlength="drop")
    settings = {"train_on": source.train_on, "system": source.system}
    encoder = encoding.Encoder(tokenizer, **settings)
    tokenised.tokenised(path, formats.Reading(), encoder, settings)
    tell("tokenised")
    found = loading.load(source, tokenizer, seed=0, vocab_size=10**6)
    tell("checked and split")
    packed = batches.Batches(found.train, batch_size=8, length=2048, seed=0)
    packed.batch(packed.steps_per_epoch // 2)
    tell("a batch from within an epoch")
    peak.stop()


class Peak:
    """The most memory so far, sampled by a thread."""

    def __init__(self) -> None:
        self.most, self._going = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._going:
            self.most = max(self.most, anonymous())
            time.sleep(0.1)

    def stop(self) -> None:
        self._going = False
        self._thread.join()


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this needs Linux")


if __name__ == "__main__":
    main()
