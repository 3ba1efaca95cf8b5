# SPDX-License-Identifier: Apache-2.0
"""Before training starts: the steps compiled for the devices that are here, and refused if their memory is too small.

built = fit.check(config, model.config, jax.devices(), length=packed.length, eval_length=..., steps=steps)
state, metrics = built.train_step(state, frozen, batch)
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from jft import errors, program
from jft.models import architecture
from jft.plan import advice, buffers, chips, compiled, topology

NAMED = 3  # buffers that the message names
# Where a container's limit stands: control groups of version 2 and of version 1.
GROUPS = (
    (pathlib.Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (pathlib.Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def check(
    config: config_dict.ConfigDict,
    model: architecture.Config,
    devices: Sequence[Any],
    *,
    length: int,
    eval_length: int,
    steps: int,
    params: Any = None,
    device_bytes: int | None = None,
) -> program.Program:
    """Compiles the training and the evaluation step.

    Args:
      config: complete and valid.
      model: its architecture.
      devices: all of the run.
      length: positions of the longest rows of training.
      eval_length: of evaluation; 0 where nothing is evaluated.
      steps: of the run.
      params: as in `program.build`.
      device_bytes: memory of each device; None asks it.

    Returns:
      The program, whose steps are compiled for these lengths; batches of another one are compiled when they come, and take
      less memory.

    Raises:
      UserError: settings that don't fit each other; or a step that does not fit a device, with the largest things in it and
        the cheapest change that helps.
    """
    size = device_memory(devices) if device_bytes is None else device_bytes
    here = _here(devices, size)
    own = compiled.Setting(config, model, here, length, eval_length, steps, params=params)
    result = compiled.compile_setting(own, evaluation=eval_length > 0, say=compiled.quiet)
    if not result.fits:
        raise errors.UserError(_refusal(result, size))
    built, evaluation = result.setting.program, result.evaluation
    assert result.train.memory  # it fits
    found = dataclasses.replace(
        built,
        train_step=_either(result.train.program.executable, built.train_step, length),
        train_bytes=result.train.memory.peak,
    )
    if evaluation is None or evaluation.memory is None:
        return found
    evaluate = _either(evaluation.program.executable, built.eval_step, eval_length)
    return dataclasses.replace(found, eval_step=evaluate, eval_bytes=evaluation.memory.peak)


def _either(ahead: Any, jitted: Any, length: int) -> Callable[..., Any]:
    """The program compiled ahead for batches of its length, else the jitted one."""

    def step(first: Any, frozen: Any, batch: Any) -> Any:
        run = ahead if batch["tokens"].shape[1] == length else jitted
        return run(first, frozen, batch)

    return step


def _here(devices: Sequence[Any], size: int) -> topology.Topology:
    """The devices at hand, as a topology. Of a chip that is not in the table only the memory is true: nothing is timed."""
    first = devices[0]
    platform = {"gpu": "cuda"}.get(first.platform, first.platform)
    known = chips.of_kind(first.device_kind) or chips.CHIPS["h100"]
    chip = dataclasses.replace(known, platform=platform, hbm_bytes=size)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return topology.Topology(
        "this machine", chip, slices, (len(devices),), tuple(devices), here=True
    )


def device_memory(devices: Sequence[Any]) -> int:
    """Bytes that a program may have on each device, with what is already there of its arguments.

    Of CPU devices all share the machine's memory: what is free of it, or of the control group's limit, in equal parts.
    """
    local = [one for one in devices if one.process_index == jax.process_index()]
    if local[0].platform != "cpu":
        found = local[0].memory_stats() or {}
        if "bytes_limit" not in found:
            raise errors.UserError(f"{local[0]}: it does not tell how much memory it has")
        return int(found["bytes_limit"])
    held = sum(shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards)
    return (free_memory() + held) // len(local)


def free_memory() -> int:
    """Bytes that this process could still take."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: what the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _fields(meminfo)["MemAvailable:"] * 1024
    for folder, limit, used in GROUPS:
        try:
            most, taken = ((folder / name).read_text().strip() for name in (limit, used))
            stat = _fields(folder / "memory.stat")
        except OSError:
            continue
        if most.isdigit():
            cache = stat.get("active_file", 0) + stat.get(
                "inactive_file", 0
            )  # goes when it is needed
            free = min(free, int(most) - int(taken) + cache)
    return free


def _fields(path: pathlib.Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in words}


def _refusal(result: compiled.Result, size: int) -> str:
    """One line: which step needs how much, the largest things in it, what would help."""
    step = next(one for one in result.steps if not one.fits())
    found = advice.cheapest(result, say=compiled.quiet)
    if found is None:
        helps = "no remat policy, micro-batch or mesh of these devices makes it fit: take more devices, or shorter rows (data.max_length)"
    else:
        helps = f"it fits with {' '.join(found.overrides)}"
    return f"the {step.what} step does not fit a device: {_needs(step, size, result.setting.model)}; {helps}"


def _needs(step: compiled.Step, size: int, model: architecture.Config) -> str:
    there = f"of {buffers.gigabytes(size)} there are"
    if step.memory is None or step.analysis is None:
        return f"{step.program.refusal} ({there})"
    named = buffers.largest(step.analysis.peak, model, NAMED)
    return f"it takes {buffers.gigabytes(step.memory.peak)} {there}; largest: {'; '.join(map(str, named))}"
