# SPDX-License-Identifier: Apache-2.0
"""Devices of hardware that is not here, for compiling ahead of time: `v5e:4x4`, `2*v5e:4x4`, `h100:8`.

The TPU compiler (libtpu) and XLA's for CUDA both compile from a description of the machine. A topology's name is a chip,
a colon, and chips along each dimension (the number of GPUs of a node); a number and an asterisk before it give several
slices, or nodes, which reach each other over the data-centre network.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from jft import errors
from jft.plan import chips, gpu_targets

HELP = "chip:shape, as v5e:4x4, v5p:2x2x4, h100:8, and with 2* before it for two slices"
# What the compiler takes; a pod has more shapes, these are the ones that Google sells up to some hundred chips.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GPUS = ("1", "2", "4", "8")
_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9\-]+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` are descriptions: programs can be compiled for them, not run. In order of slices, then as JAX lists them.

    `here`: they are devices of this machine instead.
    """

    name: str
    chip: chips.Chip
    slices: int
    shape: tuple[int, ...]  # chips along each dimension of one slice
    devices: tuple[Any, ...]
    here: bool = False

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """For `lowered.compile`: without a GPU nothing can be timed, so the compiler shall choose each kernel untried.

        Never for a program that is to run: with untried kernels a step of an 8B model took 11.9 s on an H100.
        """
        untried = self.chip.platform == "cuda" and not self.here
        return {"xla_gpu_autotune_level": 0} if untried else {}


def slices_of(chip: str) -> tuple[str, ...]:
    """Names of a chip's topologies, from the smallest."""
    own = chips.chip(chip)
    return tuple(f"{own.name}:{shape}" for shape in _shapes(own))


def _shapes(chip: chips.Chip) -> tuple[str, ...]:
    if chip.platform == "cuda":
        return _GPUS
    return _FLAT if chip.dimensions == 2 else _DEEP


def parse(name: str) -> Topology:
    """The topology of a name; see the module.

    Raises:
      UserError: no such topology, or its compiler is not installed.
    """
    found = _NAME.fullmatch(name)
    if not found or found[2] not in chips.CHIPS:
        raise errors.UserError(f"--topology={name}: no such topology{_suggestion(name)} ({HELP})")
    chip, count, shape = chips.CHIPS[found[2]], int(found[1] or 1), found[3]
    if shape not in _shapes(chip):
        raise errors.UserError(f"--topology={name}: no such topology{_suggestion(name)}")
    if count < 1:
        raise errors.UserError(f"--topology={name}: {count} slices are too few")
    sizes = tuple(map(int, shape.split("x")))
    devices = _tpus(chip, sizes, count) if chip.platform == "tpu" else _gpus(chip, sizes[0], count)
    return Topology(name, chip, count, sizes, tuple(devices))


def _suggestion(name: str) -> str:
    """Names near a wrong one: of as many chips for `v5e-16`, else of like spelling."""
    count, star, body = name.rpartition("*")
    kind = next((one for one in chips.CHIPS if re.match(rf"{one}\b", body)), None)
    if kind is None:
        every = [one for chip in chips.CHIPS for one in slices_of(chip)]
        near = difflib.get_close_matches(body, every, n=3, cutoff=0.6)
    else:
        near = _as_large(kind, body.removeprefix(kind)) or list(slices_of(kind))
    if not near:
        return f"; chips are {', '.join(chips.CHIPS)}"
    return "; did you mean " + " or ".join(count + star + one for one in near) + "?"


def _as_large(chip: str, rest: str) -> list[str]:
    """A chip's topologies of as many chips as `-16` or `:16x1` say. Google's v4-8, v5p-8 and tpu7x-8 count cores, two a chip."""
    numbers = [int(n) for n in re.findall(r"\d+", rest)]
    wanted = math.prod(numbers) // (
        2 if rest.startswith("-") and chip in ("v4", "v5p", "tpu7x") else 1
    )
    sizes = {one: math.prod(map(int, one.partition(":")[2].split("x"))) for one in slices_of(chip)}
    return [one for one, size in sizes.items() if numbers and size == wanted]


def _tpus(chip: chips.Chip, sizes: tuple[int, ...], slices: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise errors.UserError(f"compiling for {chip.name} needs libtpu: pip install 'jft[tpu]'")
    # Before libtpu loads: it asks a metadata server that only a Cloud machine has, and takes a lock for a chip that is
    # not used here, which a second process would fail on. The last two only keep it from complaining at length.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ):
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default host has 2x2 chips
    if chip.name == "v4":
        options["chip_config_name"] = (
            "megacore"  # both cores of a chip as one device, as JAX shows them
        )
    if slices > 1:
        options["num_slices"] = slices
    name = f"{chip.name}:{'x'.join(map(str, sizes))}"
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return list(described.devices)


def _gpus(chip: chips.Chip, count: int, nodes: int) -> list[Any]:
    # The plugin would else look for a driver and for libraries that only running needs, and not load.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.name,
            target_config=gpu_targets.text(chip.name),
            topology=f"{nodes}x1x{count}",
        )
    except RuntimeError as error:
        raise errors.UserError(
            f"compiling for {chip.name} needs JAX's CUDA plugin (pip install 'jft[cuda]'): {_first(error)}"
        ) from error
    return list(described.devices)


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
