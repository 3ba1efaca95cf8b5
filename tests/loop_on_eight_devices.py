# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a mesh of eight devices against the same on one: losses, results, answers; going on elsewhere."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jft import config, generate, jobs, loop, lora, models, runs, sharding, transfer
from jft.checkpoints import sums
from jft.models import architecture

assert jax.device_count() == 8
pytestmark = pytest.mark.usefixtures("quick_compiles")
WORDS = ["red", "green", "blue", "one", "two", "three"]
MESHES = {
    "lora": {"fsdp": 4, "tensor": 2},
    "full": {"data": 2, "fsdp": 2, "context": 2},
}


@pytest.fixture
def c(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> Any:
    c = config.base()
    c.data.train, c.model.path = str(tmp_path / "train.jsonl"), str(tiny_model)
    rows = [{"prompt": f"the user {a} {b}", "response": f"hello {b}"} for a in WORDS for b in WORDS]
    pathlib.Path(c.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    c.data.max_length, c.batch_size, c.steps, c.lora.rank = 64, 4, 4, 4
    # Gradients that are zero but for rounding stay small beside eps.
    c.optim.learning_rate, c.optim.eps = 3e-3, 1e-4
    c.validate.samples, c.checkpoint.every_steps = 0, 2
    return c


def train(c: Any, run_dir: pathlib.Path, **mesh: int) -> tuple[dict[str, Any], list[float]]:
    """The summary, and the losses of validations and steps."""
    c.run_dir = str(run_dir)
    c.mesh.update(config.base().mesh)
    c.mesh.update(mesh)
    done = loop.train(c)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return done, [r[key] for r in records for key in ("loss", "valid_loss") if key in r]


def check_alike(got: pathlib.Path, want: pathlib.Path) -> None:
    """The results of two runs, as they are read back."""
    leaves = []
    for folder in (got, want):
        model, adapters, _ = runs.open_result(folder / "best")
        leaves.append(adapters or model.params)
    assert jax.tree.leaves(leaves[0])
    # float32 sums in another order differ in the last place; Adam makes some tens of it in a few steps.
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, *leaves)


@pytest.mark.parametrize("kind", MESHES)
def test_a_run_on_a_mesh_is_one_on_a_device(
    kind: str, c: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c.lora.rank = 4 if kind == "lora" else 0
    got, losses = train(c, tmp_path / "mesh", **MESHES[kind])
    monkeypatch.setattr(jobs, "make_layout", lambda *_: None)
    want, alone = train(c, tmp_path / "alone")
    np.testing.assert_allclose(losses, alone, rtol=1e-5)  # as in check_alike
    for which in ("base", "tuned"):
        assert got[which]["loss"] == pytest.approx(want[which]["loss"], rel=1e-5)
    assert got["tuned"]["loss"] < got["base"]["loss"]
    check_alike(tmp_path / "mesh", tmp_path / "alone")


def test_answers_on_a_mesh_are_those_of_one_device(tiny_model: pathlib.Path) -> None:
    layout = sharding.Layout(sharding.mesh(sharding.Sizes(tensor=2), jax.devices()))
    alone = models.load(str(tiny_model))
    model = models.load(str(tiny_model), shardings=layout.weight)
    spec = lora.Spec(rank=2, targets="layers/.*/kernel", layouts=architecture.LAYOUTS)
    draw = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)  # noqa: E731
    adapters = jax.tree.map(draw, lora.init(spec, alone.params, key=jax.random.key(0)))
    placed = transfer.to_devices(adapters, layout.trainable(adapters, model.params))
    sampling = generate.Sampling(max_new_tokens=18)
    answers = []
    for generator in (generate.Generator(alone, adapters), generate.Generator(model, placed)):
        generator.stop = frozenset()
        answers.append(generator.batch([[1, 5, 9, 40], [8, 3]], sampling))
    assert answers[0] == answers[1] and len(answers[0][0]) == 18


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sums_of_arrays_do_not_depend_on_the_mesh(dtype: str) -> None:
    """Split along one axis or two, in part copied, or whole on one device."""
    x = (100 * jax.random.normal(jax.random.key(0), (8, 6, 4))).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = {sums.of({"x": x})["x"]}
    for spec in (P(), P("a"), P("b", None, "a"), P(("a", "b")), P(None, "b"), P(None, None, "a")):
        found |= {sums.of({"x": jax.device_put(x, jax.NamedSharding(mesh, spec))})["x"]}
    assert len(found) == 1
    flipped = x.at[7, 5, 3].set(x[7, 5, 3] + 1)
    assert (
        sums.of({"x": jax.device_put(flipped, jax.NamedSharding(mesh, P("a")))})["x"] not in found
    )
