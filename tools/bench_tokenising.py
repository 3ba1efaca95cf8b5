# SPDX-License-Identifier: Apache-2.0
"""Rows a second from a file to the cache: read, rendered, tokenised and written.

    python tools/bench_tokenising.py DATA.jsonl [--rows N] [--turns N] [--model MODEL]

The file is repeated up to N rows. Repeated rows have no new words, so the first pass over the file is told apart from
the later ones. CPU seconds count all processes; where other programs run, they say more than seconds do.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from jft import models
from jft.data import encoding, formats, tokenised, words, workers

_NEVER = float("inf")


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _repeated(source: pathlib.Path, rows: int, folder: pathlib.Path) -> pathlib.Path:
    lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
    path = folder / "repeated.jsonl"
    with path.open("wb") as file:
        for at in range(rows):
            file.write(lines[at % len(lines)] + b"\n")
    return path


def _read(path: pathlib.Path, tokenizer: Any) -> None:
    for _ in formats.Table(str(path)):
        pass


def _make(path: pathlib.Path, tokenizer: Any) -> None:
    encoding._tokens.cache_clear()  # with the words of the run before
    with tempfile.TemporaryDirectory() as folder:
        encoder = encoding.Encoder(tokenizer)
        tokenised._make(pathlib.Path(folder) / "made", formats.Table(str(path)), encoder)


@contextlib.contextmanager
def _settings(patience: float, by_words: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(workers, "_PATIENCE", patience))
        if not by_words:
            stack.enter_context(mock.patch.object(words, "of", lambda *_: None))
        yield


Run = tuple[Callable[[pathlib.Path, Any], None], float, bool]
_RUNS: dict[str, Run] = {
    "reading alone": (_read, _NEVER, True),
    "one process, without words": (_make, _NEVER, False),
    "one process": (_make, _NEVER, True),
    "workers from the start": (_make, 0, True),
}


def _measured(run: Run, path: pathlib.Path, tokenizer: Any) -> tuple[float, float]:
    function, patience, by_words = run
    with _settings(patience, by_words):
        began, used = time.perf_counter(), _cpu()
        function(path, tokenizer)
        return time.perf_counter() - began, _cpu() - used


def _print(title: str, rows: int, found: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{title}\n{'':28}{'rows/s':>9}{'rows per CPU second':>22}{'times the first':>18}")
    base = 0.0
    for name, measured in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        base = base or (rows / cpu if name != "reading alone" else 0.0)
        ratio = f"{rows / cpu / base:.2f}" if base else ""
        print(f"{name:28}{rows / wall:9,.0f}{rows / cpu:22,.0f}{ratio:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    tokenizer = models.load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        own = sum(1 for line in arguments.data.read_bytes().split(b"\n") if line.strip())
        for title, rows in (("once: every word is new", own), ("repeated", arguments.rows)):
            path = _repeated(arguments.data, rows, pathlib.Path(folder))
            found: dict[str, list[tuple[float, float]]] = {}
            for _ in range(arguments.turns):
                for name, run in _RUNS.items():
                    if rows == own and run[1] == 0:
                        continue  # the file ends before a process has started
                    found.setdefault(name, []).append(_measured(run, path, tokenizer))
            _print(f"{title} ({rows:,} rows)", rows, found)
    print(f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
