# SPDX-License-Identifier: Apache-2.0
"""`jft plan --topology` on a small model: figures by hand, what does not fit, the search, bad input."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from jft import cli

L, D, N, K, H, F, V = 4, 256, 4, 2, 64, 512, 512
T, RANK = 256, 16


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("libtpu")
    return ["--config=configs/sft.py", *model(tmp_path_factory.mktemp("model"))]


def model(folder: pathlib.Path, **changes: Any) -> list[str]:
    """Flags of a model that only its configuration exists of."""
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(own | changes))
    return [f"--config.model.path={folder / 'config.json'}", "--config.model.dtype=bfloat16"]


def planned(arguments: list[str]) -> dict[str, Any]:
    """The verb's JSON. In a process of its own: libtpu stays out of the tests'."""
    done = subprocess.run(
        [sys.executable, "-m", "jft.cli", "plan", "--json", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_small_model_by_hand(flags: list[str], tmp_path: pathlib.Path) -> None:
    rows = 4
    found = planned(
        [
            *flags,
            "--topology=v5e:2x2",
            f"--config.batch_size={rows}",
            f"--config.data.max_length={T}",
            "--config.remat=full",
            "--config.steps=1000",
            "--price=2",
            f"--hlo={tmp_path / 'program.txt'}",
        ]
    )
    kernels = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    weights = sum(a * b for a, b in kernels)
    low_rank = sum(RANK * (a + b) for a, b in kernels)
    attention = (
        4 * T * N * H
    )  # per token, two products; a row is one block, which the kernel computes whole
    forward = 2 * weights + 2 * low_rank + attention
    again = forward - 2 * F * D - 2 * RANK * D  # the layer's result itself is not needed again
    # Gradients in x and, of the factors, in A and B; of attention five products for two.
    backward = 2 * weights + 4 * low_rank + 5 * attention // 2
    head = 2 * 2 * D * V  # the logits, and the gradient in x
    device_tokens = rows * T // 4
    assert found["flops_per_device"] == device_tokens * (L * (forward + again + backward) + head)
    parameters = L * (weights + 2 * D) + 2 * V * D + D
    assert found["ideal_flops_per_device"] == 4 * parameters * device_tokens
    assert found["flops_ratio"] == pytest.approx(
        found["flops_per_device"] / found["ideal_flops_per_device"]
    )
    assert found["fits"] and not found["not_counted"] and found["overrides"] == []

    stored = 2 * (L * weights + 2 * V * D) // 4 + 2 * (2 * L + 1) * D
    adapters = 3 * 4 * L * low_rank // 4  # values and two moments, float32
    # Tiles of 128 lanes pad the narrow factors.
    assert stored + adapters <= found["argument_bytes_per_device"] <= 2 * (stored + adapters)
    # The chip's own fast memory counts in where temporaries are small.
    assert 0 < found["peak_bytes_per_device"] - found["argument_bytes_per_device"] < 2**27
    assert 0 < found["evaluation"]["peak_bytes_per_device"] < found["peak_bytes_per_device"]

    gathers = [one for one in found["collectives"] if one["kind"] == "all-gather"]
    assert [one["axes"] for one in gathers] == [["fsdp"]]
    # Each layer's weights for the forward and for the backward pass, three quarters of them from others; hidden states, factors.
    least = 2 * 2 * L * weights * 3 // 4
    assert least <= gathers[0]["bytes_per_device"] <= 2 * least

    tokens = 1000 * rows * T
    rate = found["tokens_per_second_per_device"] * 4
    assert found["step_seconds"] == pytest.approx(rows * T / rate)
    assert found["cost"]["tokens"] == tokens
    assert found["cost"]["dollars"] == pytest.approx(2 * 4 * tokens / rate / 3600)
    assert "ENTRY" in (tmp_path / "program.txt").read_text()


def test_what_no_change_makes_fit_is_told_with_its_largest_arrays(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    wide = 2**19
    found = planned(
        [
            "--config=configs/sft.py",
            *model(tmp_path, intermediate_size=wide),
            "--topology=v5e:1x1",
            "--config.batch_size=1",
            "--config.data.max_length=256",
            "--config.lora.rank=0",
            "--config.remat=offload",
        ]
    )
    assert not found["fits"] and found["cheapest_change"] is None
    assert "RESOURCE_EXHAUSTED" in found["refused"]
    assert found["peak_bytes_per_device"] > found["hbm_bytes_per_device"]
    assert found["step_seconds"] is None
    three = 3 * 4 * L * 3 * D * wide  # values and two moments, float32
    assert three < found["argument_bytes_per_device"] < 1.1 * three
    named = {one["name"]: one["bytes"] for one in found["largest"]}
    assert named["first moment of layers/mlp/up/kernel"] == 4 * L * D * wide
    assert named["weights layers/mlp/down/kernel"] == 4 * L * D * wide


@pytest.mark.slow
def test_the_search_ranks_by_time_what_fits(flags: list[str]) -> None:
    found = planned(
        [
            *flags,
            "--topology=v5e:1x1",
            "--config.batch_size=2",
            "--config.data.max_length=256",
            "--config.remat=full",
            "--search",
            "--limit=3",
        ]
    )
    times = [one["microseconds_per_token"] for one in found["tried"]]
    assert (
        times == sorted(times) and len(times) == 2
    )  # two micro-batches, all of which fit without remat
    assert found["overrides"] == found["tried"][0]["overrides"]
    assert found["remat"] == "none" and found["evaluation"]["step_fits"]


@pytest.mark.slow
def test_the_smallest_that_fits(flags: list[str]) -> None:
    found = planned(
        [
            *flags,
            "--topology=v6e",
            "--smallest",
            "--config.data.max_length=256",
            "--config.batch_size=2",
        ]
    )
    assert found["topology"] == "v6e:1x1" and found["fits"]
    assert found["rows"]["micro_batch"] == 1
    assert found["overrides"] == ["--config.micro_batch=1"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--topology=v5e-16"], "did you mean v5e:4x4?"),
        (["--topology=v9:4x4"], "no such topology"),
        (["--topology=v5e:4x4"], "batch_size=8 is not divisible by the 16 devices"),
        (["--topology=v5e:2x2", "--config.data.max_length=5000"], "the model has 4096 positions"),
        (["--topology=v5e:2x2", "--config.mesh.tensor=3"], "does not fit 4 devices"),
        (["--topology=v5e:2x2", "--config.mesh.tensor=4"], "does not divide num_kv_heads=2"),
        (["--topology=v9", "--smallest"], "is no chip that is known"),
        (["--topology=v5e:2x2", "--price=free"], "'free' is no number above 0"),
        (["--topology=v5e:2x2", "--search", "--limit=0"], "no number of 1 or more"),
        (["--topology=v5e:2x2", "--config.model.dtype=f8"], "model.dtype='f8'"),
        (["--topology=v5e:2x2", "--model=llama3.1-8b"], "--config.model.path"),
        ([], "--topology is missing"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *flags, *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("jft: ") and told in lines[0]


def test_a_topology_alone_needs_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--topology=v5e:2x2"]) == 2
    assert "--config=configs/sft.py" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "--model=NAME" in capsys.readouterr().err
