# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny model: what they leave behind, stopping and going on, talking to the result, bad input."""

import dataclasses
import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import cli, config, jobs, loop, runs
from jft.models import architecture
from jft.plan import fit

COLORS = ["red", "green", "blue", "one", "two", "three"]


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"the user asks {a} {b}", "response": json.dumps({"answer": b})}
        for a in COLORS
        for b in COLORS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tiny_model: pathlib.Path, data: pathlib.Path, run_dir: pathlib.Path) -> Any:
    c = config.base()
    c.model.path, c.data.train, c.run_dir = str(tiny_model), str(data), str(run_dir)
    c.data.max_length, c.batch_size, c.steps = 64, 4, 6
    c.lora.rank, c.optim.learning_rate = 4, 1e-2
    c.validate.samples, c.validate.max_new_tokens, c.validate.format = 2, 8, "json"
    c.checkpoint.every_steps = 4
    return c


def losses_of(run_dir: pathlib.Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def adapter_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors_numpy.load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_every_kind_of_adapter_has_the_same_base_and_learns(
    tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Base against tuned is said for each; the base is one and the same."""
    kinds = {
        "plain": {"lora.rank": 4},
        "all": {"lora.use_dora": True, "lora.dropout": 0.1, "optim.lora_plus_ratio": 4.0},
    }
    results = {}
    for name, options in kinds.items():
        c = settings(tiny_model, data, tmp_path / name)
        with c.unlocked():
            c.update_from_flattened_dict(options)
        results[name] = loop.train(c)
        assert results[name]["tuned"]["loss"] < results[name]["base"]["loss"]
    # Weights over their own norms, times them: float32 rounding in each of a few layers.
    losses = [result["base"]["loss"] for result in results.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "layers/mlp/up/kernel" in runs.open_result(tmp_path / "all" / "best")[1]


def test_a_run_leaves_what_explains_it(
    tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    result = loop.train(settings(tiny_model, data, run_dir), profile="3:4")
    names = {path.name for path in run_dir.iterdir()}
    files = {"config", "environment", "data_report", "summary"}
    assert {f"{name}.json" for name in files} <= names
    lines = {"metrics.jsonl", "timing.jsonl", "samples.jsonl"}
    assert {*lines, "best", "last", "checkpoints"} <= names
    assert list((run_dir / "profile").rglob("*.xplane.pb"))
    steps = [json.loads(line) for line in (run_dir / "timing.jsonl").read_text().splitlines()]
    timed = {"step", "step_seconds", "tokens_per_second", "tokens_per_second_per_device"}
    assert len(steps) == 6 and all(timed <= record.keys() for record in steps)
    timed.remove("step")
    assert timed <= result["speed"].keys() and "mfu" not in result["speed"]  # no known chip
    assert result["tuned"]["loss"] < result["base"]["loss"]
    assert [number for number, _ in losses_of(run_dir)] == [1, 2, 3, 4, 5, 6]
    # The score reported is that of the checkpoint kept: validation and test set are the same rows here.
    assert result["tuned"]["loss"] == pytest.approx(
        runs.read_sidecar(run_dir / "best").scores["loss"], rel=1e-6
    )
    model, adapters, _ = runs.open_result(run_dir / "best")
    assert model.fingerprint == runs.read_sidecar(run_dir / "best").fingerprint
    assert set(adapters) == {
        f"layers/{name}/kernel"
        for name in (
            *("attention/query", "attention/key", "attention/value", "attention/out"),
            *("mlp/gate", "mlp/up", "mlp/down"),
        )
    }


def test_what_a_token_is_multiplied_with() -> None:
    """Of which parameters utilisation is counted: by hand, for one layer and a tied or untied embedding, and experts."""
    c = architecture.Config(
        vocab_size=10,
        d_model=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        d_ff=8,
        max_length=16,
    )
    norms, attention, mlp, head = 3 * 4, 4 * (4 + 2 + 2) + 4 * 4, 3 * 4 * 8, 4 * 10
    assert jobs.matmul_parameters(c) == norms + attention + mlp + head
    tied = dataclasses.replace(c, tie_embeddings=True)
    assert jobs.matmul_parameters(tied) == norms + attention + mlp + head
    mixed = dataclasses.replace(c, experts=architecture.Experts(count=4, top_k=2))
    assert jobs.matmul_parameters(mixed) == norms + attention + 4 * 4 + 2 * mlp + head


def test_stopped_and_resumed_is_uninterrupted(
    tiny_model: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(settings(tiny_model, data, whole))

    check = fit.check

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        built = check(*args, **kwargs)

        def call(state: Any, frozen: Any, batch: Any) -> Any:
            if int(state.step) == 2:  # Ctrl-C during the third step
                os.kill(os.getpid(), signal.SIGINT)
            return built.train_step(state, frozen, batch)

        return dataclasses.replace(built, train_step=call)

    monkeypatch.setattr(fit, "check", interrupting)
    with pytest.raises(loop.Interrupted, match="after step 3 of 6"):
        loop.train(settings(tiny_model, data, parts))
    assert not (parts / "summary.json").exists()
    monkeypatch.setattr(fit, "check", check)
    loop.train(settings(tiny_model, data, parts))
    assert losses_of(parts) == losses_of(whole)
    for name in ("best", "last"):
        jax.tree.map(
            np.testing.assert_array_equal, adapter_of(parts / name), adapter_of(whole / name)
        )


@pytest.mark.slow
def test_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("loop_on_eight_devices.py"))


def test_full_fine_tuning_gives_a_model_folder(
    tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    c = settings(tiny_model, data, tmp_path / "run")
    c.lora.rank, c.optim.learning_rate = 0, 1e-3
    result = loop.train(c)
    assert result["trained_parameters"] == result["total_parameters"]
    assert result["tuned"]["loss"] < result["base"]["loss"]
    model, adapters, sidecar = runs.open_result(tmp_path / "run" / "best")
    assert sidecar.kind == "full" and not adapters
    base, _, _ = runs.open_result(tmp_path / "run" / "best", adapter=False)
    assert base.fingerprint == sidecar.fingerprint != model.fingerprint


def test_changed_settings_are_refused_by_name(
    tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    c = settings(tiny_model, data, tmp_path / "run")
    loop.train(c)
    c.validate.samples = 1  # changes nothing that is computed
    loop.train(c)
    c.optim.learning_rate = 0.5
    with pytest.raises(ValueError, match="optim.learning_rate is 0.5, was 0.01"):
        loop.train(c)


def test_generate_talks_to_the_result_and_to_the_base(
    tiny_model: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    c = settings(tiny_model, data, tmp_path / "run")
    c.steps, c.optim.learning_rate = 30, 3e-2
    loop.train(c)
    samples = [json.loads(s) for s in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    said = {}
    for which in ("best", "none"):
        capsys.readouterr()
        flags = [f"--prompt={samples[0]['prompt']}", f"--adapter={which}", "--max_new_tokens=8"]
        assert cli.main(["generate", f"--run={tmp_path / 'run'}", *flags]) == 0
        said[which] = capsys.readouterr().out.removesuffix("\n")
    # One row streamed against a padded batch: the same greedy tokens.
    assert said == {"best": samples[0]["tuned"], "none": samples[0]["base"]}
    assert said["best"] != said["none"]


BAD_ROWS = {
    "bad JSON": ('{"prompt": "a", "response": "b"}\n{"prompt": "a",\n', "train.jsonl:row 2"),
    "no response": ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "response"),
    "empty": ("", "train.jsonl"),
}


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of stderr of a command that must fail with exit code 2, without a traceback."""
    capsys.readouterr()
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("jft: ")
    return last


@pytest.fixture
def config_file(tiny_model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(
        "from jft import config\n\n\ndef get_config():\n    c = config.base()\n"
        f"    c.model.path, c.data.train = {str(tiny_model)!r}, {str(data)!r}\n"
        f"    c.run_dir = {str(tmp_path / 'run')!r}\n    c.data.max_length = 64\n    return c\n"
    )
    return f"--config={path}"


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_named(
    fault: str, config_file: str, data: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, told = BAD_ROWS[fault]
    data.write_text(text)
    assert told in run_cli(capsys, config_file)


def test_bad_settings_are_named(
    config_file: str,
    tmp_path: pathlib.Path,
    tiny_model: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "optim.learning_rate" in run_cli(capsys, config_file, "--config.optim.learning_rat=1")
    assert "int wanted" in run_cli(capsys, config_file, "--config.steps=many")
    assert "no such file" in run_cli(capsys, config_file, "--config.data.train=nowhere.jsonl")
    assert "no such file" in run_cli(capsys, "--config=nowhere.py")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((tiny_model / "config.json").read_text())
    told = run_cli(capsys, config_file, f"--config.model.path={empty}")
    assert str(empty) in told and "no tokenizer.json" in told
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    x = {}\n    return x['a']\n")
    assert "line 3" in run_cli(capsys, f"--config={broken}")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["lora.dropout=1.5"], "lora.dropout=1.5: 0 or more, below 1"),
        (["lora.exclude=nothing"], "lora.exclude='nothing' matches no parameter"),
        (["lora.exclude=.*"], "lora.exclude='.*' excludes every target"),
        (["optim.lora_plus_ratio=0.0"], "optim.lora_plus_ratio=0.0: it must be above 0"),
        (["lora.mode=fast"], "lora mode 'fast': it must be one of factored, hidden, merged"),
        (["lora.rank=0", "lora.use_dora=True"], "lora.use_dora=True without an adapter"),
        (["lora.rank=0", "lora.dropout=0.1"], "lora.dropout=0.1 without an adapter"),
        (["lora.rank=0", "optim.lora_plus_ratio=4.0"], "lora_plus_ratio=4.0 without an adapter"),
    ],
)
def test_adapter_settings_that_make_no_sense_are_named(
    flags: list[str], told: str, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in run_cli(capsys, config_file, *(f"--config.{flag}" for flag in flags))


def test_a_template_that_fails_is_told_with_the_row(
    config_file: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('only kind words') }}")
    told = run_cli(capsys, config_file, f"--config.data.chat_template={template}")
    assert "only kind words" in told
