# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the readers of files that others wrote: valid ones, mutated, give what they hold or one line of why not.

    python tools/fuzz.py TARGET [--minutes=10] [--seed=N] [--keep=tests/fuzz]

Targets: safetensors, gguf, folder, adapter, data, template. A case is a seed: --seed=N runs that one again. Cases run in
a process of its own, which ends when a case takes more than 10 s of processor time or 2 GB more than at its start; so
does one that crashes. What fails is kept as a file in --keep/TARGET, and tests/test_fuzz.py reads those again.
"""

import argparse
import base64
import collections
import contextlib
import faulthandler
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

from jft import errors

Files = dict[str, bytes]

TARGETS = {
    "safetensors": ("fuzz_weights", "Safetensors"),
    "gguf": ("fuzz_gguf", "Gguf"),
    "folder": ("fuzz_folder", "Folder"),
    "adapter": ("fuzz_adapter", "Adapter"),
    "data": ("fuzz_data", "Data"),
    "template": ("fuzz_template", "Template"),
}
SECONDS, STUCK, MEMORY = (
    10,
    120,
    2 << 30,
)  # of processor time; of waiting; bytes beyond those at the start
LONGEST = 2000  # characters of a message


def target(name: str) -> Any:
    """A target: `make(random)` gives a case's files, `read(folder)` reads them as a user's command would; `seeds()` are
    the valid files that cases are made of.

    `read` returns what came of it in a word, and raises what the reader raises, or AssertionError for a broken promise.
    """
    module, made = TARGETS[name]
    return getattr(importlib.import_module(module), made)()


def check(own: Any, files: Files, folder: pathlib.Path) -> str:
    """Reads a case's files in a folder and returns what came of it.

    Raises:
      AssertionError: a message is not one line that begins with the place.
      Exception: whatever else a reader raised but UserError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, held in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(held)
    try:
        return own.read(folder)
    except errors.UserError as error:
        check_message(str(error))
        return "refused"


def check_message(text: str) -> None:
    """One line, not long, and nothing that a terminal would obey."""
    odd = [character for character in text if not (character.isprintable() or character == "\t")]
    assert not odd, f"not printable: {text[:300]!r}"
    assert 0 < len(text) <= LONGEST, f"{len(text)} characters: {text[:300]!r}"


def kept(own: Any, path: pathlib.Path) -> Files:
    """The files of a case that was kept."""
    held = json.loads(path.read_text())["files"]
    return {name: _unpacked(own, name, entry) for name, entry in held.items()}


def keep(own: Any, path: pathlib.Path, files: Files, why: str) -> None:
    """Writes a case's files as one file; of those that are as they should be only which they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: _seed(own, name, held) or _packed(held) for name, held in files.items()}
    path.write_text(json.dumps({"why": why, "files": entries}, indent=1) + "\n")


def _seed(own: Any, name: str, held: bytes) -> dict[str, int] | None:
    found = [i for i, files in enumerate(own.seeds()) if files.get(name) == held]
    return {"seed": found[0]} if found else None


def _packed(held: bytes) -> dict[str, str]:
    small = base64.b85encode(zlib.compress(held, 9)).decode()
    try:
        text = held.decode()
    except UnicodeDecodeError:
        return {"zlib": small}
    return {"text": text} if len(text) < 500 else {"zlib": small}


def _unpacked(own: Any, name: str, entry: dict[str, Any]) -> bytes:
    if "seed" in entry:
        return own.seeds()[entry["seed"]][name]
    if "text" in entry:
        return entry["text"].encode()
    return zlib.decompress(base64.b85decode(entry["zlib"]))


def work(name: str, first: int) -> None:
    """The child's part: cases from a seed on, told on stdout one by one."""
    own, out = target(name), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    with tempfile.TemporaryDirectory() as scratch:  # what is made once, and compiled
        with contextlib.suppress(Exception):
            check(own, own.make(random.Random(0)), pathlib.Path(scratch) / "case")
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # tells where, then ends the process
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(first, sys.maxsize):
            print(json.dumps({"seed": seed}), file=out, flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            faulthandler.dump_traceback_later(STUCK, exit=True)
            try:
                done = check(own, own.make(random.Random(seed)), pathlib.Path(scratch) / "case")
                print(json.dumps({"done": done}), file=out, flush=True)
            except BaseException as error:
                told = {"fault": _signature(error), "trace": traceback.format_exc()[-3000:]}
                print(json.dumps(told), file=out, flush=True)


def _signature(error: BaseException) -> str:
    """Which fault it is: the same place in our code raises it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/jft/" in frame.filename] or list(frames)
    return f"{type(error).__name__} at {pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"


@contextlib.contextmanager
def _child(name: str, first: int, said: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, name, f"--work={first}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def run(name: str, minutes: float, into: pathlib.Path) -> int:
    """Cases until the time is over; returns how many different faults there were."""
    end, seed = time.monotonic() + 60 * minutes, time.time_ns() // 10**6
    counts, faults = collections.Counter[str](), collections.Counter[str]()
    while time.monotonic() < end:
        with tempfile.TemporaryFile("w+") as said, _child(name, seed, said) as child:
            assert child.stdout
            for line in child.stdout:
                told = json.loads(line)
                seed = told.get("seed", seed)
                if "done" in told:
                    counts[told["done"]] += 1
                elif "fault" in told:
                    _fault(name, into, seed, told["fault"], told["trace"], faults)
                if time.monotonic() > end:
                    break
            else:
                said.seek(0)
                trace = said.read()[-3000:]
                _fault(name, into, seed, _ended(child.wait(), trace), trace, faults)
                seed += 1
    cases = sum(counts.values()) + sum(faults.values())
    print(f"{name}: {cases:,} cases, {len(faults)} faults {dict(faults)}; {dict(counts)}")
    return len(faults)


def _ended(status: int, trace: str) -> str:
    places = [line.split("/jft/")[1] for line in trace.splitlines() if "/jft/" in line]
    how = {-signal.SIGPROF: "time is over", 1: "stuck"}.get(status, f"ended with {status}")
    return f"{how} at {places[0] if places else '?'}"


def _fault(name: str, into: pathlib.Path, seed: int, what: str, trace: str, faults: Any) -> None:
    faults[what] += 1
    if faults[what] > 1:
        return
    print(f"{name} seed {seed}: {what}\n{trace}", flush=True)
    own = target(name)
    keep(own, into / name / f"{seed}.json", own.make(random.Random(seed)), what)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the readers of files that others wrote.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="run this case alone")
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("tests/fuzz"))
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if flags.work is not None:
        work(flags.target, flags.work)
    if flags.seed is None:
        return run(flags.target, flags.minutes, flags.keep) > 0
    with tempfile.TemporaryDirectory() as scratch:
        own = target(flags.target)
        files = own.make(random.Random(flags.seed))
        print(files)
        print(check(own, files, pathlib.Path(scratch) / "case"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
