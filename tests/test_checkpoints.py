# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a small state: what comes back is what was saved, or it is said that it is not."""

import json
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jft import checkpoints, errors, step
from jft.checkpoints import digests, schedule, sums

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool")


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_changes_both_sums(data: Any) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from([(), (2, 3, 4)]))
    x = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
    raw = bits_of(x).copy()
    at = data.draw(st.integers(0, raw.size - 1))
    raw[at] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7))
    y = np.frombuffer(raw.tobytes(), x.dtype).reshape(shape)
    before, after = (sums.of({"x": jnp.asarray(v)})["x"] for v in (x, y))
    assert before[:8] != after[:8] and before[8:] != after[8:]


def test_exchanged_elements_and_other_bits_of_the_same_value_change_the_sums() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    zero = {sums.of({"x": jnp.array([v])})["x"] for v in (0.0, -0.0)}
    assert len(zero) == 2
    assert (
        len({sums.of({"x": v})["x"] for v in (x, x[::-1], x[:, ::-1], x.T, x.ravel()[::-1])}) == 5
    )


@pytest.mark.parametrize(("row", "column"), [(3, 0), (1, 5), (4, 2)])
def test_parts_add_up_to_the_whole(row: int, column: int) -> None:
    """However it is cut, as it is on a mesh."""
    x = jax.random.normal(jax.random.key(0), (6, 5))
    total = np.zeros(2, np.uint32)
    for rows in (slice(0, row), slice(row, 6)):
        for columns in (slice(0, column), slice(column, 5)):
            part = x[rows, columns]
            begin = np.array([rows.start, columns.start], np.uint32)
            total += np.asarray(sums._sums(part, begin, x.shape))
    assert sums.of({"x": x})["x"] == "".join(f"{int(word):08x}" for word in total)


def state_of(seed: int, number: int) -> step.State:
    keys = jax.random.split(jax.random.key(seed), 3)
    values = {f"leaf{i}": jax.random.normal(key, (8, 3)) for i, key in enumerate(keys)}
    fresh = step.init_state(values, optax.adam(1e-3))
    return step.State(jnp.asarray(number, jnp.int32), values, fresh.opt_state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with checkpoints 1 and 2. Do not write into it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    made = checkpoints.Checkpoints(folder, 2)
    for number in (1, 2):
        made.save(state_of(number, number), {"note": f"of step {number}", "values": [0.1, None]})
    made.close()
    return folder


@pytest.fixture
def copied(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def opened(folder: pathlib.Path) -> tuple[step.State, dict[str, Any]]:
    made = checkpoints.Checkpoints(folder, 2)
    found = made.restore(state_of(0, 0))
    made.close()
    assert found is not None
    return found


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bits_of(np.asarray(a)).tolist() == bits_of(np.asarray(b)).tolist() for a, b in pairs)


def test_the_newest_comes_back_bit_for_bit(saved: pathlib.Path) -> None:
    state, record = opened(saved)
    assert same(state, state_of(2, 2))
    assert record["note"] == "of step 2" and record["step"] == 2 and record["values"] == [0.1, None]
    listed = json.loads((saved / "2" / digests.FILE).read_text())["record"]
    files = {str(p.relative_to(saved / "2")) for p in (saved / "2").rglob("*") if p.is_file()}
    late = {name for name in files if name.endswith("commit_success.txt")}
    assert files - set(listed) == {digests.FILE, "_CHECKPOINT_METADATA"} | late


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)


def damage_each(
    saved: pathlib.Path, folder: pathlib.Path, harm: Callable[[pathlib.Path], Any], capsys: Any
) -> dict[str, bool]:
    found = {}
    for path in files_of(saved / "2"):
        shutil.copytree(saved, folder)
        name = str(path.relative_to(saved / "2"))
        harm(folder / "2" / name)
        state, record = opened(folder)
        number, told = record["step"], capsys.readouterr().err
        assert same(state, state_of(number, number)), name
        assert (
            (number == 1) == ("checkpoint 2 is damaged" in told) == (folder / "damaged-2").exists()
        )
        found[name] = number == 1
        shutil.rmtree(folder)
    return found


# Orbax writes these when all else is complete; nothing is read from them.
HARMLESS = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize("kind", ["bit", "shortened", "missing"])
def test_damage_of_any_file_is_found_and_the_step_before_is_used(
    kind: str, saved: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    draw = random.Random(0)
    harms = {
        "bit": lambda path: flip(path, draw.randrange(8 * path.stat().st_size)),
        "shortened": lambda path: os.truncate(path, path.stat().st_size // 2),
        "missing": pathlib.Path.unlink,
    }
    found = damage_each(saved, tmp_path / "copy", harms[kind], capsys)
    assert len(found) > 10
    missed = [name for name, detected in found.items() if not detected]
    # Without the list of files the arrays' sums remain.
    allowed = (*HARMLESS, digests.FILE) if kind == "missing" else HARMLESS
    assert all(name.split("/")[-1] in allowed for name in missed), missed


def test_the_sums_find_what_the_list_of_files_does_not_know(
    copied: pathlib.Path, capsys: Any
) -> None:
    """Another array under a right list of files: as if memory had changed before it was written."""
    listed = copied / "2" / digests.FILE
    listed.unlink()
    record = copied / "2" / "record" / "metadata"
    sealed = json.loads(record.read_text())
    body = sealed["record"]
    body["arrays"]["trainable/leaf1"][2] = "0" * 16
    record.write_text(json.dumps(digests.seal(body)))
    _, found = opened(copied)
    assert found["step"] == 1
    told = capsys.readouterr().err
    assert "checkpoint 2 is damaged (trainable/leaf1 is not as saved)" in told
    assert "step 1 is used instead" in told


def test_when_all_are_damaged_it_is_said_and_nothing_is_deleted(
    copied: pathlib.Path, capsys: Any
) -> None:
    for number in ("1", "2"):
        (copied / number / "record" / "metadata").write_text("{}")
    with pytest.raises(errors.UserError, match="all 2 checkpoints are damaged"):
        opened(copied)
    assert "none is left" in capsys.readouterr().err
    assert files_of(copied / "damaged-1") and files_of(copied / "damaged-2")


def test_a_state_of_other_arrays_is_refused_by_name(saved: pathlib.Path) -> None:
    made = checkpoints.Checkpoints(saved, 2)
    like = state_of(0, 0)
    other = step.State(like.step, like.trainable | {"leaf1": jnp.zeros((8, 4))}, like.opt_state)
    with pytest.raises(
        errors.UserError, match=r"leaf1 is float32 \(8, 3\) there and float32 \(8, 4\)"
    ):
        made.restore(other)
    made.close()
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


def test_the_newest_and_the_best_stay(tmp_path: pathlib.Path) -> None:
    made = checkpoints.Checkpoints(tmp_path, 2)
    for number in range(1, 7):
        made.save(state_of(0, number), {}, best=min(number, 2))
    made.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_leftovers_of_killed_saves_go(copied: pathlib.Path) -> None:
    left = copied / "3.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    made = checkpoints.Checkpoints(copied, 2)
    assert made.latest == 2
    made.save(state_of(3, 3), {})
    made.close()
    assert sorted(path.name for path in copied.iterdir()) == ["2", "3"]


def test_a_failed_save_is_told_at_the_next_poll(
    copied: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints.Checkpoints(copied, 2)

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digests, "write", full)
    made.save(state_of(3, 3), {})
    told = ""
    for _ in range(500):
        time.sleep(0.01)
        try:
            made.poll()
        except errors.UserError as error:
            told = str(error)
            break
    assert "the checkpoint of step 3 could not be saved (No space left on device; " in told
    assert "bytes are free); the same command goes on from step 2" in told
    made.close()
    monkeypatch.undo()
    assert opened(copied)[1]["step"] == 2


def test_a_schedule_by_steps_and_by_minutes() -> None:
    now = [100.0]
    due = schedule.Schedule(4, 2.0, clock=lambda: now[0])
    assert [n for n in range(1, 13) if due.at(n)] == [4, 8, 12]
    now[0] += 119
    assert not due.overdue()
    now[0] += 1
    assert due.overdue() and not due.overdue()  # asked once
    now[0] += 100
    due.saved()
    now[0] += 119
    assert not due.overdue()
    never = schedule.Schedule(0, 0.0, clock=lambda: now[0])
    now[0] += 1e9
    assert not never.overdue() and not never.at(4)
    with pytest.raises(errors.UserError, match="every_minutes=-1"):
        schedule.Schedule(0, -1.0)
