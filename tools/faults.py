# SPDX-License-Identifier: Apache-2.0
"""Injects faults into a small real run, and shows what it says to each and whether anything is lost.

    python tools/faults.py --flips=100

Needs root on Linux for the full and the read-only file system (small tmpfs mounts). The run is stopped by SIGTERM in its
middle; a copy of its folder is harmed; the same command is given again, where needed after the fault is mended. At the
end metrics and adapter must equal those of the uninterrupted run bit for bit. Prints a table in Markdown, and exits with 1
where something was lost or a flipped bit went unnoticed.
"""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import chaos
import jax
import numpy as np

from jft import checkpoints, cli, config, jobs, lock, step

STEPS, STOP = 24, 13


class Faults:
    """The run, its copies, and the table."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.lost = folder, False
        # Each start compiles the same programs.
        jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        source = chaos.model_of(folder)
        self.model, self.data = folder / "base", folder / "train.jsonl"
        shutil.copytree(source, self.model)
        shutil.copy(chaos.DATA, self.data)
        self.config = folder / "faults_config.py"
        self.config.write_text(
            chaos.CONFIG.format(
                model=str(self.model), data=str(self.data), steps=STEPS, every=chaos.EVERY
            )
        )
        self.train("whole")
        with at_each_step(stop):
            self.train("stopped")

    def train(self, name: str, *flags: str) -> tuple[int, str]:
        """The exit code, and what was said that matters."""
        said = io.StringIO()
        arguments = [f"--config={self.config}", f"--config.run_dir={self.folder / name}", *flags]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(["train", *arguments])
        lines = said.getvalue().replace("\r", "\n").split("\n")
        return code, " / ".join(x for x in lines if re.match("jft:|checkpoint |--force", x))

    def inject(
        self,
        what: str,
        harm: Callable[[pathlib.Path], Any],
        mend: Callable[[pathlib.Path], Any] = lambda _: None,
        flags: tuple[str, ...] = (),
    ) -> None:
        """Harms a copy, goes on, mends it where the run refused, and goes on."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.folder / "stopped", run)
        harm(run)
        code, said = self.train("run", *flags)
        self.finish(what, run, code, said, mend)

    def finish(
        self,
        what: str,
        run: pathlib.Path,
        code: int,
        said: str,
        mend: Callable[[pathlib.Path], Any],
    ) -> None:
        first = code
        if code:
            mend(run)
            code, _ = self.train(str(run.relative_to(self.folder)))
        whole = self.folder / "whole"
        names = (
            "metrics.jsonl",
            "last/adapter_model.safetensors",
            "best/adapter_model.safetensors",
        )
        equal = not code and all(chaos.same_file(whole / name, run / name) for name in names)
        self.lost |= not equal
        self.row(what, first, said, "equal, bit for bit" if equal else "DIFFERS")

    def row(self, what: str, code: int, said: str, then: str) -> None:
        said = said.replace(str(self.folder), "").replace("|", "\\|")
        said = re.sub(r"sha256:(\w{6})\w+", r"sha256:\1...", said)
        print(f"| {what} | {code} | {said} | {then} |", flush=True)


@contextlib.contextmanager
def at_each_step(action: Callable[[int], Any]) -> Iterator[None]:
    """Does something while the step's batch is made."""
    batch = jobs.Job.batch

    def acting(job: Any, index: int) -> Any:
        action(index + 1)
        return batch(job, index)

    jobs.Job.batch = acting
    try:
        yield
    finally:
        jobs.Job.batch = batch


def stop(number: int) -> None:
    if number == STOP:
        os.kill(os.getpid(), signal.SIGTERM)


def newest(run: pathlib.Path) -> pathlib.Path:
    return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))


def largest(run: pathlib.Path) -> pathlib.Path:
    return max(newest(run).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (value,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def flip_bits(faults: Faults, count: int) -> None:
    """Of all bits of the newest checkpoint, one each time."""
    job = jobs.prepare(config.load(str(faults.config)), faults.folder / "stopped")
    source, copy = faults.folder / "stopped/checkpoints", faults.folder / "flipped"
    files = [path for path in newest(faults.folder / "stopped").rglob("*") if path.is_file()]
    sizes, draw = [path.stat().st_size for path in files], random.Random(0)
    found: collections.Counter[str] = collections.Counter()
    right = read(source, job.program.state)
    for _ in range(count):
        path = draw.choices(files, sizes)[0]
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        flip(copy / path.relative_to(source), draw.randrange(8 * path.stat().st_size))
        with contextlib.redirect_stderr(io.StringIO()):
            state = read(copy, job.program.state)
        if int(state.step) == STOP:
            found["changes nothing" if same(state, right) else "UNNOTICED"] += 1
        else:
            found["found, the step before is used"] += 1
    faults.lost |= found["UNNOTICED"] > 0
    told = ", ".join(f"{number} {what}" for what, number in sorted(found.items()))
    faults.row(f"{count} single flipped bits, of {sum(sizes):,} bytes", 0, "", told)


def read(folder: pathlib.Path, like: step.State) -> step.State:
    saved = checkpoints.Checkpoints(folder, 2)
    found = saved.restore(like)
    saved.close()
    assert found is not None
    return found[0]


def same(one: step.State, other: step.State) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@contextlib.contextmanager
def mounted(place: pathlib.Path, size: str) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def remount(place: pathlib.Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


def disks(faults: Faults) -> None:
    """A full and a read-only file system."""
    place = faults.folder / "disk"
    with mounted(place, "2m"):
        many = "--config.checkpoint.keep=99"
        code, said = faults.train("disk/run", many)
        faults.finish("full disk", place / "run", code, said, lambda _: remount(place, "size=64m"))
    with mounted(place / "again", "64m"):
        run = place / "again" / "run"
        shutil.copytree(faults.folder / "stopped", run)
        remount(place / "again", "ro")
        code, said = faults.train("disk/again/run")
        mend = lambda _: remount(place / "again", "rw")  # noqa: E731
        faults.finish("read-only folder", run, code, said, mend)


def change_base(faults: Faults) -> None:
    (weights,) = faults.model.glob("*.safetensors")
    kept = faults.folder / "kept.safetensors"
    shutil.copy(weights, kept)
    faults.inject(
        "base model changed underneath",
        lambda _: flip(weights, 8 * (weights.stat().st_size - 4)),
        lambda _: shutil.copy(kept, weights),
    )


def edit_data(faults: Faults) -> None:
    before = faults.data.read_text()
    faults.inject(
        "data edited between runs",
        lambda _: faults.data.write_text(before.replace("delivery", "deliveries", 1)),
        lambda _: faults.data.write_text(before),
    )


def jump_clock(faults: Faults) -> None:
    """The date is another one in every step."""
    now, draw, offset = time.time, random.Random(0), [0.0]

    def jump(_: int) -> None:
        offset[0] = draw.uniform(-1e6, 1e6)

    time.time = lambda: now() + offset[0]
    try:
        with at_each_step(jump):
            faults.inject("the clock jumps by days, both ways", lambda _: None)
    finally:
        time.time = now


def hold(faults: Faults) -> None:
    """Another process has the folder."""
    held: list[lock.Lock] = []
    faults.inject(
        "a second process on the folder",
        lambda run: held.append(lock.Lock(run)),
        lambda _: held.pop().release(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flips", type=int, default=100)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jft-faults-") as folder:
        faults = Faults(pathlib.Path(folder))
        print("| fault | exit code | what is printed | the run in the end |\n|---|---|---|---|")
        faults.inject("nothing", lambda _: None)
        faults.inject(
            "truncated file", lambda run: os.truncate(p := largest(run), p.stat().st_size // 2)
        )
        faults.inject("missing file", lambda run: largest(run).unlink())
        faults.inject("one flipped bit", lambda run: flip(largest(run), 4000))
        faults.inject(
            "half a line in metrics.jsonl, timing.jsonl lost",
            lambda run: [
                os.truncate(run / "metrics.jsonl", 700),
                (run / "timing.jsonl").unlink(),
            ],
        )
        flip_bits(faults, flags.flips)
        disks(faults)
        change_base(faults)
        edit_data(faults)
        jump_clock(faults)
        hold(faults)
    return int(faults.lost)


if __name__ == "__main__":
    sys.exit(main())
