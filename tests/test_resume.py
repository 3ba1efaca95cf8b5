# SPDX-License-Identifier: Apache-2.0
"""A run that was interrupted, damaged or changed, and goes on: it is the uninterrupted one, bit for bit, or refuses."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jft import checkpoints, config, errors, jobs, loop, runs
from jft.plan import fit

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
WORDS = ["red", "green", "blue", "one", "two", "three"]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"the user asks {a} {b}", "response": json.dumps({"answer": b})}
        for a in WORDS
        for b in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tiny_model: pathlib.Path, data: pathlib.Path, run_dir: pathlib.Path) -> Any:
    c = config.base()
    c.model.path, c.data.train, c.run_dir = str(tiny_model), str(data), str(run_dir)
    # As in tests/test_loop.py: what it compiled is compiled.
    c.data.max_length, c.batch_size, c.steps = 64, 4, STEPS
    c.lora.rank, c.optim.learning_rate = 4, 1e-2
    c.validate.samples, c.validate.every_steps = 0, 3
    c.checkpoint.every_steps = 2
    return c


Settings = Callable[[str], Any]


@pytest.fixture
def of(tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path) -> Settings:
    """The settings of a run, by its folder's name."""
    return lambda name: settings(tiny_model, data, tmp_path / name)


@pytest.fixture(scope="module")
def whole(
    tiny_model: pathlib.Path, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop.train(settings(tiny_model, data, folder))
    return folder


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Does something while a step is dispatched, once."""

    def install(number: int, action: Callable[[], Any]) -> None:
        check, done = fit.check, []

        def built(*args: Any, **kwargs: Any) -> Any:
            program = check(*args, **kwargs)

            def call(state: Any, frozen: Any, batch: Any) -> Any:
                if int(state.step) + 1 == number and not done:
                    done.append(number)
                    action()
                return program.train_step(state, frozen, batch)

            return dataclasses.replace(program, train_step=call)

        monkeypatch.setattr(fit, "check", built)

    return install


def check_same(run_dir: pathlib.Path, whole: pathlib.Path) -> None:
    """Metrics and results byte by byte; parameters and moments bit by bit."""
    for name in ("metrics.jsonl", *(f"{x}/adapter_model.safetensors" for x in ("best", "last"))):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (run_dir / "timing.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))
    records = []
    for folder in (run_dir, whole):
        sealed = json.loads((folder / f"checkpoints/{STEPS}/record/metadata").read_text())
        records.append(sealed["record"])
    # The arrays' sums stand for their bits.
    assert records[0]["arrays"] == records[1]["arrays"] and len(records[0]["arrays"]) > 40
    best = [runs.read_sidecar(folder / "best") for folder in (run_dir, whole)]
    assert best[0].step == best[1].step and best[0].scores == best[1].scores


class Killed(BaseException):
    """Stands for SIGKILL: nothing that follows is done on purpose. What was begun may end."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("number", [slow(2), slow(4), slow(6)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    number: int, of: Settings, whole: pathlib.Path, at_step: Any
) -> None:
    """Before the first checkpoint; after the validation of step 3 and its checkpoint; in the last step."""
    at_step(number, kill)
    with pytest.raises(Killed):
        loop.train(of("run"))
    run_dir = pathlib.Path(of("run").run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss')
    loop.train(of("run"))
    check_same(run_dir, whole)


@pytest.mark.parametrize("number", [3, slow(4), slow(6)])
def test_a_stopped_run_loses_no_step(
    number: int, of: Settings, whole: pathlib.Path, at_step: Any
) -> None:
    """Also where a validation was due, which waits for the next start."""
    at_step(number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted, match=f"after step {number} of 6"):
        loop.train(of("run"))
    run_dir = pathlib.Path(of("run").run_dir)
    assert (run_dir / "checkpoints" / str(number)).exists()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert lines[-1]["step"] == number and "loss" in lines[-1]
    loop.train(of("run"))
    check_same(run_dir, whole)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    of: Settings, whole: pathlib.Path, at_step: Any, capsys: Any
) -> None:
    at_step(6, kill)
    with pytest.raises(Killed):
        loop.train(of("run"))
    run_dir = pathlib.Path(of("run").run_dir)
    (largest,) = sorted((run_dir / "checkpoints/4").rglob("*"), key=lambda p: p.stat().st_size)[-1:]
    os.truncate(largest, largest.stat().st_size - 1)
    capsys.readouterr()
    loop.train(of("run"))
    told = capsys.readouterr().err
    assert "checkpoint 4 is damaged (state/" in told and "step 3 is used instead" in told
    assert "resuming after step 3 of 6" in told
    check_same(run_dir, whole)


@pytest.mark.slow
def test_a_lost_folder_comes_back_from_checkpoints_elsewhere(
    of: Settings, whole: pathlib.Path, at_step: Any, tmp_path: pathlib.Path
) -> None:
    """A machine with its own disk that is gone: the checkpoints hold the history of the metrics too."""

    def elsewhere(name: str) -> Any:
        c = of(name)
        c.checkpoint.folder = str(tmp_path / "kept")
        return c

    at_step(5, kill)
    with pytest.raises(Killed):
        loop.train(elsewhere("first"))
    assert not (tmp_path / "first/checkpoints").exists()
    loop.train(elsewhere("second"))
    for name in ("metrics.jsonl", "last/adapter_model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(
        errors.UserError, match="holds checkpoints, and --fresh moves run_dir alone"
    ):
        loop.train(elsewhere("second"), fresh=True)
    other = elsewhere("third")
    other.seed = 5
    with pytest.raises(errors.UserError, match="seed is 5, was 0 since the checkpoint of step 6"):
        loop.train(other)


@pytest.mark.slow
def test_force_lets_other_settings_pass_and_writes_it_down(
    of: Settings, at_step: Any, capsys: Any
) -> None:
    at_step(5, kill)
    with pytest.raises(Killed):
        loop.train(of("run"))
    c = of("run")
    c.optim.learning_rate = 0.5
    run_dir = pathlib.Path(c.run_dir)
    told = "optim.learning_rate is 0.5, was 0.01"
    with pytest.raises(errors.UserError, match=f"{told}.*--force to go on"):
        loop.train(c)
    capsys.readouterr()
    loop.train(c, force=True)
    assert f"--force: after step 4 {told}" in capsys.readouterr().err
    (line,) = (run_dir / "forced.jsonl").read_text().splitlines()
    assert json.loads(line) == {"after_step": 4, "changed": [told]}
    assert runs.read_json(run_dir / "config.json")["resolved"]["optim"]["learning_rate"] == 0.5
    loop.train(c)  # it is that run now


@pytest.mark.slow
def test_other_data_and_another_base_are_refused_by_fingerprint(
    of: Settings, at_step: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(name: str) -> Any:
        c = of(name)
        copy = tmp_path / "own.jsonl"
        if not copy.exists():
            copy.write_text(pathlib.Path(c.data.train).read_text())
        c.data.train = str(copy)
        return c

    at_step(5, kill)
    with pytest.raises(Killed):
        loop.train(own("run"))
    rows = (tmp_path / "own.jsonl").read_text()
    (tmp_path / "own.jsonl").write_text(rows.replace("asks red", "asked red"))
    with pytest.raises(errors.UserError, match="data.train has fingerprint .*, had .* of step 4"):
        loop.train(own("run"))
    (tmp_path / "own.jsonl").write_text(rows)
    prepare = jobs.prepare

    def changed(*args: Any) -> Any:
        job = prepare(*args)
        return dataclasses.replace(
            job, model=dataclasses.replace(job.model, fingerprint="sha256:0")
        )

    monkeypatch.setattr(jobs, "prepare", changed)
    with pytest.raises(errors.UserError, match="the base model has fingerprint sha256:0, had"):
        loop.train(own("run"))


@pytest.mark.slow
def test_a_save_that_fails_stops_the_run_and_the_next_start_goes_on(
    of: Settings, whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.digests.write

    def full(folder: Any) -> None:
        if "4" in folder.name:
            raise OSError(28, "No space left on device")
        write(folder)

    monkeypatch.setattr(checkpoints.digests, "write", full)
    with pytest.raises(errors.UserError, match="step 4 could not be saved .*from step 3$"):
        loop.train(of("run"))
    monkeypatch.undo()
    loop.train(of("run"))
    check_same(pathlib.Path(of("run").run_dir), whole)


@pytest.mark.slow
def test_the_best_checkpoint_stays(whole: pathlib.Path) -> None:
    best = runs.read_sidecar(whole / "best")
    steps = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert best.step in steps and {4, 6} <= steps
    # Its weights are those of best/: one is read by orbax, the other by the adapter's reader.
    read = checkpoints.Checkpoints(whole / "checkpoints", 2)
    job = jobs.prepare(config_of(whole), whole)
    state, record = read.restore_step(best.step, job.program.state)
    read.close()
    assert record["progress"]["best"]["step"] == best.step
    loaded = job.model.load_adapter(whole / "best")
    for path, factors in loaded.items():
        pair = jax.tree.leaves(factors), jax.tree.leaves(state.trainable[path])
        jax.tree.map(np.testing.assert_array_equal, *pair)


def config_of(run_dir: pathlib.Path) -> Any:
    c = config.base()
    c.update(runs.read_json(run_dir / "config.json")["resolved"])
    return c
