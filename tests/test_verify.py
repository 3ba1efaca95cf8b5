# SPDX-License-Identifier: Apache-2.0
"""`jft verify`: a sound run passes, and each kind of damage is named with the exit code 1."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from jft import cli, config, lock, loop

WORDS = ["red", "green", "blue", "one", "two", "three"]


@pytest.fixture(scope="module")
def run(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run of six steps with checkpoints at 4 and 6 and of the best. Do not write into it."""
    folder = tmp_path_factory.mktemp("verify")
    rows = [
        {"prompt": f"the user asks {a} {b}", "response": json.dumps({"answer": b})}
        for a in WORDS
        for b in WORDS
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config.base()
    c.model.path, c.data.train = str(tiny_model), str(folder / "train.jsonl")
    c.run_dir = str(folder / "run")
    # As in tests/test_loop.py: what it compiled is compiled.
    c.data.max_length, c.batch_size, c.steps = 64, 4, 6
    c.lora.rank, c.optim.learning_rate = 4, 1e-2
    c.validate.samples, c.checkpoint.every_steps = 0, 2
    loop.train(c)
    return folder / "run"


def verify(capsys: Any, folder: pathlib.Path) -> tuple[int, dict[str, str], dict[str, str]]:
    """The exit code, faults and notes."""
    capsys.readouterr()
    code = cli.main(["verify", str(folder), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["sound"] == (code == 0)
    return code, *({f["what"]: f[k] for f in said["findings"] if f[k]} for k in ("fault", "note"))


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != lock.FILE]
    return {str(path): path.read_bytes() for path in files}


def test_a_sound_run_passes_and_nothing_in_it_is_touched(run: pathlib.Path, capsys: Any) -> None:
    """Also while another process trains there and is saving."""
    held, saving = lock.Lock(run), run / "checkpoints/9.orbax-checkpoint-tmp"
    saving.mkdir()
    before = snapshot(run)
    code, faults, notes = verify(capsys, run)
    assert code == 0 and not faults
    assert saving.exists() and snapshot(run) == before
    held.release()
    saving.rmdir()
    assert {"checkpoint 4", "checkpoint 6", "best/", "last/"} <= notes.keys()
    assert notes["going on"] == (
        "steps 5 to 6, with a stop after 5: equal to those without a stop, bit for bit"
    )
    assert notes["metrics.jsonl"] == "the losses of steps 5 to 6 come again"


def test_what_is_wrong_is_named(run: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints/6/state/_METADATA").unlink()
    weights = folder / "best/adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (folder / "last/adapter_config.json").write_text("{}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for record in changed:
        if record["step"] == 6 and "loss" in record:
            record["loss"] += 1e-6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
    code, faults, _ = verify(capsys, folder)
    assert code == 1
    assert faults.pop("checkpoint 6") == "state/_METADATA is missing"
    assert faults.pop("best/").endswith("adapter_model.safetensors is not as it was written")
    assert faults.pop("last/").endswith("adapter_config.json is not as it was written")
    assert faults.pop("metrics.jsonl").startswith("step 6 has loss")
    assert not faults


def test_a_step_that_is_not_the_same_twice_is_found(
    run: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a key that is drawn anew at every start."""
    from jft import verify as module

    made, batch = [], module.jobs.Job.batch

    def other(job: Any, number: int) -> Any:
        made.append(number)
        return batch(job, number if len(made) < 4 else number + 1)

    monkeypatch.setattr(module.jobs.Job, "batch", other)
    code, faults, _ = verify(capsys, run)
    assert code == 1 and "differ from those without a stop" in faults["going on"]


def test_a_base_that_is_gone_leaves_the_files_to_check(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    described = json.loads((folder / "config.json").read_text())
    described["resolved"]["model"]["path"] = str(tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps(described))
    code, faults, notes = verify(capsys, folder)
    assert code == 1 and list(faults) == ["base model and data"]
    assert notes["checkpoint 6"].startswith("its files are as they were written")
    assert cli.main(["verify", str(tmp_path)]) == 2
