# SPDX-License-Identifier: Apache-2.0
"""Kills a small real run again and again, and compares what it comes to with the same run uninterrupted, bit for bit.

    python tools/chaos.py --kills=50 --terms=10
    python tools/chaos.py --processes=2 --kills=8 --terms=2

Kills are SIGKILL at random moments, half of them while a checkpoint is saved; of several processes one is killed. SIGTERMs
must lose no step, and their time to the process's end is measured. The model is ../shared/stories260K where that is
there, else the tests' model; the data is configs/data/support. It prints a table, and exits with 1 if anything differs.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
from jft import config

def get_config():
    c = config.base()
    c.model.path, c.data.train = {model!r}, {data!r}
    c.data.chat_template, c.data.max_length, c.data.overlength = "plain", 320, "drop"
    c.steps, c.batch_size, c.lora.rank, c.lora.dropout = {steps}, 4, 8, 0.05
    c.optim.learning_rate = 3e-3
    c.validate.every_steps, c.validate.samples = 20, 0
    c.checkpoint.every_steps = {every}
    return c
"""
EVERY = 5
DATA = ROOT / "configs/data/support/train.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1, help="on this machine, 2 devices each")
    parser.add_argument("--steps", type=int, default=0, help="of the run; default: 8 a signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where all is kept; default: a temporary one")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        return child(*flags.child)
    with tempfile.TemporaryDirectory(prefix="jft-chaos-") as scratch:
        folder = pathlib.Path(flags.folder or scratch)
        return Chaos(folder, flags).run()


def child(events: str, *arguments: str) -> int:
    """`jft`, which tells the parent when a step or a save begins and ends."""
    from jft import checkpoints, cli, jobs

    file = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = os.environ.get("JFT_PROCESS", "0")

    def tell(what: str) -> None:
        os.write(file, f"{number} {os.getpid()} {what}\n".encode())

    batch, save = jobs.Job.batch, checkpoints.Checkpoints.save

    def telling_batch(job: Any, step: int) -> Any:
        tell(f"step {step + 1}")
        return batch(job, step)

    def telling_save(self: Any, *args: Any, **kwargs: Any) -> None:
        tell("save 0")
        save(self, *args, **kwargs)

    jobs.Job.batch, checkpoints.Checkpoints.save = telling_batch, telling_save
    tell("start 0")
    return cli.main(arguments)


def model_of(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a small real model, or of the tests' own, which is made."""
    model = ROOT.parent / "shared/stories260K/hf"
    if model.exists():
        return model
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny  # pyright: ignore[reportMissingImports]

    tiny.save(folder / "model")
    return folder / "model"


@dataclasses.dataclass
class Counts:
    """What was done to the run."""

    attempts: int = 0
    kills_starting: int = 0
    kills_between: int = 0
    kills_saving: int = 0
    saves_cut: int = 0  # of these, a checkpoint was left half
    computed: int = 0  # steps, those that were done again included
    terms: int = 0
    lost: int = 0  # steps done before a SIGTERM and not saved
    seconds: list[float] = dataclasses.field(default_factory=list)  # from SIGTERM to the end


class Chaos:
    """One comparison."""

    def __init__(self, folder: pathlib.Path, flags: argparse.Namespace):
        self.folder, self.flags, self.draw = folder, flags, random.Random(flags.seed)
        self.steps = flags.steps or 8 * (flags.kills + flags.terms) + 20
        self.counts = Counts()
        self.events = folder / "events"
        folder.mkdir(parents=True, exist_ok=True)
        text = CONFIG.format(
            model=str(model_of(folder)), data=str(DATA), steps=self.steps, every=EVERY
        )
        (folder / "chaos_config.py").write_text(text)

    def run(self) -> int:
        print(f"uninterrupted: {self.steps} steps", file=sys.stderr)
        done = self._start(self.folder / "whole")
        if done.wait():
            print(self._log(), file=sys.stderr)
            return 1
        actions = ["save", "step"] * (self.flags.kills // 2) + ["term"] * self.flags.terms
        actions += ["step"] * (self.flags.kills % 2)
        self.draw.shuffle(actions)
        for left, action in zip(range(len(actions), 0, -1), actions, strict=True):
            if not self._interrupt(action, left):
                break
        while (code := self._start(self.folder / "run").wait()) == 75:
            self.counts.attempts += 1
        self.counts.attempts += 1
        return self._report(code)

    def _start(self, run_dir: pathlib.Path) -> subprocess.Popen[bytes]:
        self.events.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "tools/chaos.py"), "--child", str(self.events)]
        command += ["train", f"--config={self.folder / 'chaos_config.py'}"]
        command += [f"--config.run_dir={run_dir}"]
        if self.flags.processes > 1:
            several = [f"--processes={self.flags.processes}", "--devices=2"]
            command = [sys.executable, str(ROOT / "launch/local.py"), *several, *command]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                command, env=os.environ | cache | {"JAX_PLATFORMS": "cpu"}, stdout=log, stderr=log
            )

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def _told(self) -> list[tuple[int, int, str, int]]:
        """(process, pid, what, number) of all that was told so far."""
        if not self.events.exists():
            return []
        lines = [line.split() for line in self.events.read_text().splitlines()]
        return [(int(a), int(b), what, int(n)) for a, b, what, n in lines]

    def _interrupt(self, action: str, left: int) -> bool:
        """One attempt, and its end by a signal; False if the run ended before."""
        running = self._start(self.folder / "run")
        self.counts.attempts += 1
        starting = action == "step" and self.draw.random() < 0.1
        target = self._pick_step(left)
        if starting:
            time.sleep(self.draw.uniform(0.1, 4.0))
        elif not self._wait(running, target, action):
            running.wait()
            return False
        if action != "term":
            time.sleep(self.draw.uniform(0.0, 0.15 if action == "save" else 0.05))
        self._signal(running, action, starting)
        return True

    def _pick_step(self, left: int) -> int:
        """Where to interrupt: so that the signals that are left share the steps that are left."""
        done = max((int(p.name) for p in self._checkpoints()), default=0)
        share = max(2, 2 * (self.steps - done) // (left + 1))
        return done + self.draw.randint(1, share)

    def _checkpoints(self) -> list[pathlib.Path]:
        found = (self.folder / "run/checkpoints").glob("*")
        return [path for path in found if path.name.isdecimal()]

    def _wait(self, running: subprocess.Popen[bytes], target: int, action: str) -> bool:
        """Until the step, or the first save from there on, has begun."""
        while running.poll() is None:
            told = self._told()
            reached = [i for i, one in enumerate(told) if one[2] == "step" and one[3] >= target]
            if reached and action != "save":
                return True
            if reached and any(one[2] == "save" for one in told[reached[0] :]):
                return True
            time.sleep(0.002)
        return False

    def _signal(self, running: subprocess.Popen[bytes], action: str, starting: bool) -> None:
        told = self._told()
        steps = [one[3] for one in told if one[2] == "step"]
        first = self.counts.computed
        if action == "term":
            began = time.monotonic()
            running.send_signal(signal.SIGTERM)
            code = running.wait()
            self.counts.seconds.append(time.monotonic() - began)
            self._check_term(code)
        else:
            pids = sorted({one[1] for one in told})
            several = self.flags.processes > 1 and pids
            os.kill(self.draw.choice(pids) if several else running.pid, signal.SIGKILL)
            running.wait()
            left = list((self.folder / "run/checkpoints").glob("*.orbax-checkpoint-tmp"))
            self.counts.saves_cut += bool(left)
            name = "starting" if starting or not steps else "saving" if action == "save" else ""
            name = f"kills_{name or 'between'}"
            setattr(self.counts, name, getattr(self.counts, name) + 1)
        steps = [one[3] for one in self._told() if one[2] == "step" and one[0] == 0]
        self.counts.computed = first + len(steps)
        print(f"{action}: after {len(steps)} steps, to {max(steps, default=0)}", file=sys.stderr)

    def _check_term(self, code: int) -> None:
        """Every step that was begun is in the newest checkpoint."""
        self.counts.terms += 1
        begun = max(one[3] for one in self._told() if one[2] == "step")
        kept = max((int(path.name) for path in self._checkpoints()), default=0)
        self.counts.lost += begun - kept
        said = re.search(r"stopped after step (\d+)", self._log())
        if code != 130 or said is None or int(said[1]) != kept:
            self.counts.lost += 1
            print(f"SIGTERM: exit code {code}, checkpoint {kept}\n{self._log()}", file=sys.stderr)

    def _report(self, code: int) -> int:
        c, checks = self.counts, {}
        whole, run = self.folder / "whole", self.folder / "run"
        if code == 0:
            for name in ("best/adapter_model.safetensors", "last/adapter_model.safetensors"):
                checks[name] = same_file(whole / name, run / name)
            checks["metrics.jsonl"] = same_file(whole / "metrics.jsonl", run / "metrics.jsonl")
            checks["parameters and moments"] = same_state(whole, run, self.steps)
        else:
            print(self._log(), file=sys.stderr)
        middle, slowest = (
            f"{f(c.seconds):.2f} s" if c.seconds else "-" for f in (statistics.median, max)
        )
        kills = c.kills_starting + c.kills_between + c.kills_saving
        rows = {
            "steps of the run": self.steps,
            "SIGKILLs": kills,
            "... while it started": c.kills_starting,
            "... at a random moment of training": c.kills_between,
            "... at a save": c.kills_saving,
            "half checkpoints left behind": c.saves_cut,
            "SIGTERMs": c.terms,
            "... steps lost": c.lost,
            "... from the signal to the end, median": middle,
            "... slowest": slowest,
            **{name: "equal, bit for bit" if same else "DIFFERS" for name, same in checks.items()},
        }
        print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
        return int(code != 0 or not all(checks.values()) or c.lost > 0)


def same_file(one: pathlib.Path, other: pathlib.Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def same_state(one: pathlib.Path, other: pathlib.Path, step: int) -> bool:
    """Whether two checkpoints hold the same arrays, as orbax reads them and without our sums."""
    import jax
    import orbax.checkpoint as ocp

    def read(folder: pathlib.Path) -> Any:
        place = folder.resolve() / "checkpoints" / str(step) / "state"
        described = ocp.StandardCheckpointer().metadata(place).item_metadata.tree
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), described
        )
        return ocp.StandardCheckpointer().restore(place, like)

    pairs = zip(jax.tree.leaves(read(one)), jax.tree.leaves(read(other)), strict=True)
    equal = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]
    print(json.dumps({"arrays": len(equal), "equal": sum(equal)}), file=sys.stderr)
    return len(equal) > 10 and all(equal)


if __name__ == "__main__":
    sys.exit(main())
