# SPDX-License-Identifier: Apache-2.0
"""The watch over the loss, and runs in which some steps are not finite: what is told, kept, counted, and when they stop."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jft import cli, config, divergence, errors, loop, optim
from jft.plan import fit

# The losses of the 112 steps of configs/support.py.
REAL = """
1.635 1.23 0.744 0.413 0.361 0.516 0.228 0.234 0.32 0.221 0.171 0.148 0.241 0.209 0.097 0.126 0.145 0.069 0.074 0.128
0.103 0.097 0.117 0.087 0.062 0.131 0.166 0.085 0.04 0.039 0.231 0.029 0.094 0.113 0.063 0.086 0.103 0.113 0.099 0.088
0.147 0.05 0.119 0.072 0.089 0.073 0.071 0.14 0.035 0.058 0.014 0.023 0.035 0.025 0.04 0.037 0.024 0.063 0.029 0.026
0.008 0.03 0.064 0.007 0.063 0.005 0.022 0.023 0.022 0.009 0.014 0.122 0.018 0.022 0.021 0.035 0.035 0.01 0.006 0.016
0.02 0.005 0.026 0.026 0.022 0.025 0.004 0.031 0.012 0.006 0.005 0.014 0.01 0.025 0.018 0.073 0.008 0.026 0.011 0.036
0.021 0.014 0.014 0.016 0.007 0.011 0.03 0.006 0.022 0.012 0.006 0.07
"""
SUPPORT = [float(x) for x in REAL.split()]


def values(loss: float) -> dict[str, float]:
    good = math.isfinite(loss)
    return {"loss": loss, "grad_norm": 1.0 if good else loss, "skipped": float(not good)}


def told(losses: list[float], watch: divergence.Watch | None = None) -> list[str]:
    watch = watch or divergence.Watch(5)
    return [line for n, x in enumerate(losses, 1) for line in watch.step(n, values(x))]


def curve(seed: int, noise: float, steps: int = 400) -> list[float]:
    """A loss that falls from 4 to 1 and varies from batch to batch, now and then three times as much."""
    rng = np.random.default_rng(seed)
    wide = np.where(rng.random(steps) < 0.05, 3, 1)
    losses = 1 + 3 * np.exp(-np.arange(steps) / 60) + noise * wide * rng.normal(size=steps)
    return losses.tolist()


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.3])
def test_a_loss_that_only_varies_is_no_spike(noise: float) -> None:
    assert [told(curve(seed, noise)) for seed in range(20)] == [[]] * 20
    assert told(SUPPORT) == []


def test_a_spike_is_told_once_with_its_step() -> None:
    losses = curve(0, 0.03)
    for start, length in ((200, 1), (300, 12)):
        for n in range(start, start + length):
            losses[n - 1] += 2
    watch = divergence.Watch(5)
    lines = told(losses, watch)
    assert [line.split(":")[0] for line in lines] == ["step 200", "step 300"]
    assert f"jumped to {losses[199]:.3f}" in lines[0]
    assert f"median is {np.median(losses[149:199]):.3f}" in lines[0]
    assert watch.spikes == 2
    late = list(SUPPORT)
    late[90] += 1
    assert [line.split(":")[0] for line in told(late)] == ["step 91"]


def test_a_loss_that_stays_up_becomes_the_usual_one() -> None:
    losses = [*curve(0, 0.03, 200), *(x + 3 for x in curve(0, 0.03)[200:])]
    losses[350] += 2
    assert [line.split(":")[0] for line in told(losses)] == ["step 201", "step 351"]


def test_steps_in_a_row_are_counted_to_the_limit() -> None:
    watch = divergence.Watch(2)
    over = []
    for n, x in enumerate([1, math.nan, math.inf, 1, math.nan, math.nan, math.nan], 1):
        lines = watch.step(n, values(x))
        assert bool(lines) == (not math.isfinite(x))
        over.append(watch.over)
    assert over == [False] * 6 + [True]
    assert (watch.skipped, watch.in_a_row) == (5, 3)


@pytest.mark.parametrize("cut", [1, 30, 201, 305])
def test_a_watch_that_goes_on_from_its_state_is_uninterrupted(cut: int) -> None:
    losses = curve(1, 0.03)
    losses[199], losses[200] = math.nan, math.nan
    losses[299:310] = [x + 2 for x in losses[299:310]]
    whole, first = divergence.Watch(5), divergence.Watch(5)
    want = told(losses, whole)
    got = told(losses[:cut], first)
    second = divergence.Watch.from_state(5, json.loads(json.dumps(first.state())))
    for n, x in enumerate(losses[cut:], cut + 1):
        got += second.step(n, values(x))
    assert got == want and len(want) == 3
    assert second == whole


def test_a_limit_below_none_is_refused() -> None:
    with pytest.raises(errors.UserError, match="optim.max_skipped=-1: it must be 0 or more"):
        optim.Optim(max_skipped=-1)


def test_a_record_is_json_of_the_strict_kind() -> None:
    text = json.dumps(divergence.record(**values(math.nan)), allow_nan=False)
    assert json.loads(text) == {"loss": None, "grad_norm": None, "skipped": 1}


@pytest.fixture
def c(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> Any:
    data = tmp_path / "train.jsonl"
    words = ["red", "green", "blue", "one", "two", "three"]
    rows = [{"prompt": f"the user asks {a} {b}", "response": b} for a in words for b in words]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config.base()
    c.model.path, c.data.train, c.run_dir = str(tiny_model), str(data), str(tmp_path / "run")
    c.data.max_length, c.batch_size, c.steps, c.lora.rank = 64, 4, 6, 4
    c.validate.samples, c.checkpoint.every_steps = 0, 2
    return c


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the batches of these steps give a loss that is not a number."""
    check = fit.check

    def spoil(*steps: int) -> None:
        def spoiled(*args: Any, **kwargs: Any) -> Any:
            built = check(*args, **kwargs)

            def call(state: Any, frozen: Any, batch: Any) -> Any:
                if int(state.step) + 1 in steps:
                    batch = batch | {"weights": batch["weights"] * np.float32(np.nan)}
                return built.train_step(state, frozen, batch)

            return dataclasses.replace(built, train_step=call)

        monkeypatch.setattr(fit, "check", spoiled)

    return spoil


def records(c: Any) -> list[dict[str, Any]]:
    def refused(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    text = (pathlib.Path(c.run_dir) / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refused) for line in text.splitlines()]
    return [r for r in found if "loss" in r]


def test_a_run_goes_on_after_steps_that_are_not_finite(
    c: Any, spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(2, 3)
    result = loop.train(c)
    assert (result["skipped_steps"], result["loss_spikes"]) == (2, 0)
    assert [r["skipped"] for r in records(c)] == [0, 1, 1, 0, 0, 0]
    assert [r["loss"] is None for r in records(c)] == [False, True, True, False, False, False]
    folder = pathlib.Path(c.run_dir) / "divergence"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2.jsonl", "step-3.jsonl"]
    said = capsys.readouterr().err
    assert (
        f"step 2: loss nan, gradient norm nan: not finite; the step was skipped; its rows are in {folder}"
        in said
    )
    rows = [json.loads(line) for line in (folder / "step-2.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in pathlib.Path(c.data.train).read_text().splitlines()]
    assert len(rows) >= c.batch_size
    for row in rows:
        path, number = row["source"].split(":row ")
        assert path == c.data.train
        asked, answer = given[int(number) - 1].values()
        assert [turn["content"] for turn in row["messages"]] == [asked, answer]
        assert asked in row["text"] and answer in row["text"]


def test_a_run_stops_at_the_limit_with_its_last_good_checkpoint(
    c: Any, spoil: Callable[..., None]
) -> None:
    c.optim.max_skipped = 1
    spoil(3, 4)
    with pytest.raises(errors.UserError) as caught:
        loop.train(c)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "step 4: loss nan, gradient norm nan: not finite, for 2 steps in a row"
    )
    folder = pathlib.Path(c.run_dir)
    assert f"its rows are in {folder / 'divergence' / 'step-4.jsonl'}" in message
    assert f"checkpoint is that of step 2 in {folder / 'checkpoints'}" in message
    assert "lower optim.learning_rate" in message
    spoil()  # mended: the same command goes on
    loop.train(c)
    assert [(r["step"], r["skipped"]) for r in records(c)] == [(n, 0) for n in range(1, 7)]


@pytest.mark.slow
def test_debug_stops_at_the_first_and_names_the_operation(
    c: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jft import models
    from jft.models import export

    model = models.load(c.model.path)
    kernel = model.params["layers"]["mlp"]["up"]["kernel"]
    kernel = kernel.at[1].multiply(1e38)  # finite, but its products are not
    model.params["layers"]["mlp"]["up"]["kernel"] = kernel
    export.save(tmp_path / "model", model.config, model.params, model.tokenizer)
    file = tmp_path / "mine.py"
    file.write_text("from jft import config\n\n\ndef get_config():\n    return config.base()\n")
    flags = [f"--config.{k}={v}" for k, v in config.flatten(c).items() if v != ""]
    flags += [f"--config.model.path={tmp_path / 'model'}", "--debug"]
    with pytest.raises(errors.UserError) as caught:
        cli.main(["train", f"--config={file}", *flags])
    message = str(caught.value)
    assert message.startswith("step 1: ") and "\n" not in message
    assert "the loss is not finite; the first such operation is mul at " in message
    assert "layers.py" in message and "(activate), layer 1;" in message  # gate times up
    assert "    out  float32" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("skipping_on_eight_devices.py"))
