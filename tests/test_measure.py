# SPDX-License-Identifier: Apache-2.0
"""Times of steps by a clock that the test winds, and a real trace."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from jft import errors, measure


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_the_time_between_two_readings() -> None:
    clock = Clock()
    # 8 devices of 1e12 flops; 1e9 per token: 8,000 tokens/s would be all that they can do.
    meter = measure.Meter(8, flops_per_token=1e9, peak_flops=1e12, clock=clock)
    clock.now += 30.0  # compiles
    assert meter.step(4000)["step_seconds"] == 30.0
    with meter.waiting():
        clock.now += 0.25
    clock.now += 0.75
    assert meter.step(4000) == {
        "step_seconds": 1.0,
        "tokens_per_second": 4000.0,
        "tokens_per_second_per_device": 500.0,
        "data_wait_seconds": 0.25,
        "mfu": 0.5,
    }
    clock.now += 60.0  # a validation
    meter.restart()
    clock.now += 2.0
    record = meter.step(4000)
    assert (record["step_seconds"], record["mfu"], record["data_wait_seconds"]) == (2.0, 0.25, 0.0)


def test_the_summary_leaves_the_compilation_out() -> None:
    clock = Clock()
    meter = measure.Meter(2, clock=clock)
    assert meter.summary() == {}
    for seconds, tokens in ((50.0, 100), (1.0, 90), (9.0, 110), (1.0, 100)):
        clock.now += seconds
        meter.step(tokens)
    assert meter.summary() == {
        "step_seconds": 1.0,
        "tokens_per_second": 100.0,
        "tokens_per_second_per_device": 50.0,
        "data_wait_seconds": 0.0,
    }


def test_a_wait_that_fails_is_counted_all_the_same() -> None:
    clock = Clock()
    meter = measure.Meter(1, clock=clock)
    with pytest.raises(OSError), meter.waiting():
        clock.now += 3.0
        raise OSError
    clock.now += 1.0
    assert meter.step(1)["data_wait_seconds"] == 3.0


@pytest.mark.parametrize("spec", ["10", "a:b", "5:5", "7:3", ":4", "-1:4"])
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(errors.UserError, match="start:stop is wanted"):
        measure.Profile(spec, "nowhere", first=1, last=100)


@pytest.mark.parametrize(("spec", "first", "last"), [("3:5", 4, 9), ("3:11", 1, 9)])
def test_steps_that_are_not_in_the_run(spec: str, first: int, last: int) -> None:
    with pytest.raises(errors.UserError, match=f"from step {first} to {last}"):
        measure.Profile(spec, "nowhere", first=first, last=last)


def test_the_trace_holds_the_steps_asked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatched: list[int] = []
    seen: list[str] = []
    begin, end = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda f: (seen.append(f"start {dispatched}"), begin(f))
    )
    monkeypatch.setattr(
        jax.profiler, "stop_trace", lambda: (seen.append(f"stop {dispatched}"), end())
    )
    add = jax.jit(lambda x: x + 1)
    x = jnp.zeros(())
    profile = measure.Profile("2:4", str(tmp_path), first=1, last=4)
    for number in range(1, 5):
        with profile.step(number, x):
            x = add(x)
        dispatched.append(number)
    profile.close()
    assert seen == ["start [1]", "stop [1, 2, 3]"]
    (trace,) = tmp_path.rglob("*.xplane.pb")
    names = trace.read_bytes()
    assert b"train" in names and b"step_num" in names


def test_a_trace_to_the_last_step_ends_with_the_run(tmp_path: pathlib.Path) -> None:
    profile = measure.Profile("1:2", str(tmp_path), first=1, last=1)
    with profile.step(1, None):
        jnp.ones(3).block_until_ready()
    assert not list(tmp_path.rglob("*.xplane.pb"))
    profile.close()
    profile.close()
    assert list(tmp_path.rglob("*.xplane.pb"))
