# SPDX-License-Identifier: Apache-2.0
"""Topologies by name: what exists, what is suggested, what a program compiled for one counts."""

import json
import os
import re
import subprocess
import sys

import pytest

from jft import errors
from jft.plan import chips, gpu_targets, topology


def refused(name: str) -> str:
    with pytest.raises(errors.UserError) as told:
        topology.parse(name)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5e-16", "did you mean v5e:4x4?"),
        ("v5p-8", "did you mean v5p:2x2x1?"),  # Google counts two cores a chip there
        ("2*v6e-64", "did you mean 2*v6e:8x8?"),
        ("v5e:16", "did you mean v5e:4x4?"),
        ("h100-8", "did you mean h100:8?"),
        ("h100:3", "h100:1 or h100:2 or h100:4 or h100:8"),
        ("0*v5e:4x4", "0 slices are too few"),
        ("b7", "chips are v4, v5e"),
    ],
)
def test_a_wrong_name_is_answered_with_right_ones(name: str, meant: str) -> None:
    assert meant in refused(name)


def test_a_missing_compiler_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jft[tpu]'" in refused("v5e:4x4")
    assert "pip install 'jft[cuda]'" in refused("h100:1")


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_slices_grow(chip: str) -> None:
    sizes = []
    for name in topology.slices_of(chip):
        size = 1
        for n in name.partition(":")[2].split("x"):
            size *= int(n)
        sizes.append(size)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1


def test_every_gpu_can_be_described() -> None:
    for chip in chips.CHIPS.values():
        if chip.platform == "cuda":
            assert f"device_memory_size: {chip.hbm_bytes}" in gpu_targets.text(chip.name)


COMPILED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jft.plan import compiling, hlo, topology

L, D, B = 8, 512, 131072
on = topology.parse("v5e:2x2")
mesh = Mesh(np.array(on.devices), ("fsdp",))
def shaped(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
def loss(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None
    return lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32).sum()
def step(w, x):
    return w - jax.grad(loss)(w, x)
def lowered(w, x):
    return jax.jit(step, donate_argnums=0).lower(w, x)
arguments = shaped((L, D, D), None, "fsdp"), shaped((B, D), "fsdp")
program = compiling.compile_program(lowered(*arguments), on.compiler_options)
found = hlo.analyse(program.text, mesh.shape)
mesh = Mesh(np.array(topology.parse("v5e:1x1").devices), ("fsdp",))
large = compiling.compile_program(lowered(shaped((L, D, D)), shaped((32 * B, D))))
print(json.dumps({
    "flops": found.flops.total,
    "wanted": 4 * L * 2 * (B // 4) * D * D,
    "findings": found.findings(),
    "peak": found.peak.bytes,
    "truth": program.memory.peak,
    "refusal": program.refusal,
    "large": [large.memory.peak, large.refusal, hlo.analyse(large.text, mesh.shape).peak.buffers[0].shape],
    "axes": sorted({own.axes for own in found.collectives}),
    "largest": [found.peak.buffers[0].what, found.peak.buffers[0].shape],
    "gathered": sum(own.total for own in found.collectives if own.kind == "all-gather"),
    "several": [
        (len(one.devices), one.chips)
        for one in map(topology.parse, ("2*v5e:2x2", "v4:2x2x1", "tpu7x:2x2x1", "v6e:1x1"))
    ],
}))
"""


def test_a_program_for_tpu_by_hand_and_against_its_compiler() -> None:
    pytest.importorskip("libtpu")
    # In its own process: nothing that another test did may be what makes it work.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "ALLOW_MULTIPLE"))
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Forward, again, and two gradients; each layer's weights are gathered twice, three quarters of them from others.
    assert found["flops"] == found["wanted"]
    assert not found["findings"]
    assert found["gathered"] == 2 * 8 * 512 * 512 * 2 * 3 / 4
    assert found["axes"] == [["fsdp"]]
    # The compiler counts the chip's fast memory in where temporaries do not outgrow it (128 MiB); here they do.
    assert found["peak"] == pytest.approx(found["truth"], rel=0.02)
    kept = "bf16[8,32768,512]"  # the layers' inputs, for the backward pass
    assert found["largest"] == ["temporary", kept]
    # One that does not fit is taken apart all the same: the compiler's line has the total alone, in GiB.
    peak, refusal, largest = found["large"]
    total = float(re.search(r"HLO temporaries \(([\d.]+)G\)", refusal)[1]) * chips.GIB
    assert not found["refusal"] and largest == "bf16[8,4194304,512]"
    assert peak == pytest.approx(total, rel=0.02)
    assert found["several"] == [[8, 8], [4, 4], [8, 4], [1, 1]]
