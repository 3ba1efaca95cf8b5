# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes, started by the project's launcher: as one process, stopped and killed, gone on elsewhere."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import config, loop, runs

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = ["red", "green", "blue", "one", "two", "three"]
FILE = """
from jft import config

def get_config():
    c = config.base()
    c.model.path, c.data.train = {model!r}, {data!r}
    c.data.max_length, c.batch_size, c.steps, c.lora.rank = 64, 4, 6, 4
    # Gradients that are zero but for rounding stay small beside eps.
    c.optim.learning_rate, c.optim.eps = 3e-3, 1e-4
    c.validate.every_steps, c.validate.samples, c.validate.max_new_tokens = 3, 0, 4
    c.checkpoint.every_steps = 2
    return c
"""


@pytest.fixture(scope="module")
def file(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The configuration's file."""
    folder = tmp_path_factory.mktemp("processes")
    rows = [{"prompt": f"the user {a} {b}", "response": f"hello {b}"} for a in WORDS for b in WORDS]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.py").write_text(FILE.format(model=str(tiny_model), data=str(data)))
    return folder / "c.py"


@pytest.fixture
def alone(file: pathlib.Path, tmp_path: pathlib.Path, quick_compiles: None) -> pathlib.Path:
    """The folder of the same run by one process on one device."""
    here(file, tmp_path / "alone")
    return tmp_path / "alone"


def here(file: pathlib.Path, run_dir: pathlib.Path, **changes: Any) -> dict[str, Any]:
    c = config.load(str(file))
    c.run_dir = str(run_dir)
    c.update_from_flattened_dict(changes)
    return loop.train(c)


def launch(
    file: pathlib.Path,
    run_dir: pathlib.Path,
    *flags: str,
    when: str = "0:0:SIGTERM",
    retries: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Two processes of two devices each; `when` as in loop_script.py."""
    script = [sys.executable, str(ROOT / "tests/loop_script.py"), f"{when}:{run_dir}.signalled"]
    place = {"PYTHONPATH": str(ROOT), "JFT_CACHE": str(file.parent / "cache")}
    return subprocess.run(
        [sys.executable, ROOT / "launch/local.py", "--devices=2", f"--retries={retries}"]
        + [*script, "train", f"--config={file}", f"--config.run_dir={run_dir}", *flags],
        env=os.environ | place | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


def losses(run_dir: pathlib.Path) -> list[float]:
    """Of each step and validation."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in ("loss", "valid_loss") if key in record]


def check_alike(got: pathlib.Path, want: pathlib.Path) -> None:
    """Losses and results of two runs. float32 sums in another order differ in the last place; Adam makes some tens of it."""
    np.testing.assert_allclose(losses(got), losses(want), rtol=1e-5)
    for which in ("base", "tuned"):
        found = [runs.read_json(run / "summary.json")[which]["loss"] for run in (got, want)]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    (file,) = (want / "best").glob("*.safetensors")
    one, other = (safetensors_numpy.load_file(run / "best" / file.name) for run in (got, want))
    assert one.keys() == other.keys() and one
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_goes_on(
    file: pathlib.Path, alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    done = launch(file, run_dir, when="1:3:SIGTERM")
    assert done.returncode == 130, done.stdout + done.stderr
    # Known on both one step after it came to one, so step 4; and saved there. Step 3 was the best one.
    assert done.stdout.count("jft: stopped after step 4 of 6; the same command goes on") == 1
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["3", "4"]
    assert runs.read_json(run_dir / "environment.json")["processes"] == 2
    here(file, run_dir)
    check_alike(run_dir, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_relaunch_finishes(
    file: pathlib.Path, alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir, answers = tmp_path / "run", "--config.validate.samples=2"
    done = launch(file, run_dir, answers, when="1:4:SIGKILL", retries=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"jft: process 1 on .* has gone without a word", done.stdout), done.stdout
    assert "launch: process 1 was killed by SIGKILL; the others were ended" in done.stderr
    # The save of step 3, the best one, had begun; it is complete or does not exist.
    assert re.search(r"\[0\] resuming after step [23] of 6", done.stdout), done.stdout
    assert "[1] resuming" not in done.stdout
    check_alike(run_dir, alone)
    (again,) = {
        line for line in launch(file, run_dir).stdout.splitlines() if "finished run" in line
    }
    assert again.startswith(f"[0] {run_dir} is a finished run")


@pytest.mark.slow
def test_full_fine_tuning_by_two_processes_goes_on_on_another_mesh(
    file: pathlib.Path, tmp_path: pathlib.Path, quick_compiles: None
) -> None:
    here(file, tmp_path / "alone", **{"lora.rank": 0})
    full, run_dir = "--config.lora.rank=0", tmp_path / "run"
    done = launch(file, run_dir, full, when="0:3:SIGINT")
    assert done.returncode == 130, done.stdout + done.stderr
    done = launch(
        file,
        run_dir,
        full,
        "--config.mesh.tensor=2",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_alike(run_dir, tmp_path / "alone")


@pytest.mark.slow
def test_processes_that_differ_are_told_in_what(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Another seed on one of them, through the environment."""
    mine = tmp_path / "c.py"
    mine.write_text(
        file.read_text().replace(
            "return c", "import os; c.seed = int(os.environ['JFT_PROCESS']); return c"
        )
    )
    done = launch(mine, tmp_path / "run")
    assert done.returncode == 2
    assert (
        "the command differs between processes: config, seed, process 0 has 0, process 1 has 1"
        in done.stdout
    )
