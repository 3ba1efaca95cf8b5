# SPDX-License-Identifier: Apache-2.0
"""The fastest setting that fits: remat policies, micro-batches and meshes, compiled one after the other.

For one mesh, memory only grows with the rows of a forward pass and with what the backward pass keeps, and time only falls.
So what fits has a border, which is walked: from the fastest policy with the fewest rows, to more rows where it fits and to
the next policy where it does not. All else is either slower than a point of the border or does not fit.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jft import errors, sharding
from jft.plan import changes, compiled, topology

SHARE = (
    0.9  # of the memory there is: what else runs, and another release of the compiler, need some
)
LIMIT = 12  # programs to compile
SECONDS = (25, 50)  # that compiling a training step takes on two cores
POLICIES = ("none", "products", "attention", "full")  # from the fastest
LONG = 8192  # positions of a row from which it may be worth while to split it


@dataclasses.dataclass(frozen=True)
class Tried:
    """A setting that was compiled."""

    setting: compiled.Setting
    step: compiled.Step | None  # None where the compiler failed
    fits: bool
    seconds_per_token: float  # infinite where it does not fit
    why: str = ""

    def row(self) -> dict[str, Any]:
        """Of a table."""
        memory = self.step.memory if self.step else None
        analysis = self.step.analysis if self.step else None
        flops = analysis.flops.total if analysis else None
        return {
            "overrides": self.setting.overrides,
            "fits": self.fits,
            "peak_bytes_per_device": memory.peak if memory else None,
            "flops_ratio": flops / compiled.ideal_flops(self.setting) if flops else None,
            "microseconds_per_token": 1e6 * self.seconds_per_token if self.fits else None,
            "why": self.why,
        }


def search(
    own: compiled.Setting, *, limit: int = LIMIT, say: compiled.Say = compiled.quiet
) -> tuple[list[Tried], compiled.Result | None]:
    """(everything tried, the fastest first; the fastest of which evaluation fits too).

    Args:
      own: the setting to start from; its batch_size stays.
      limit: how many training steps to compile.
      say: is told what goes on.
    """
    low, high = (limit * seconds / 60 for seconds in SECONDS)
    say(
        f"search: at most {limit} programs, of {SECONDS[0]} to {SECONDS[1]} s each on two cores: {low:.0f} to {high:.0f} minutes (--limit={limit})"
    )
    tried: list[Tried] = []
    for mesh in meshes(own):
        tried += _walk(mesh, limit - len(tried), say)
        if len(tried) >= limit:
            say(f"search: stopped at --limit={limit}")
            break
    tried.sort(key=lambda one: one.seconds_per_token)
    return tried, _best(tried, say)


def _best(tried: Sequence[Tried], say: compiled.Say) -> compiled.Result | None:
    for one in tried:
        if one.fits and one.step:
            evaluation = compiled.compile_step(
                one.setting, compiled.EVALUATE, explain=False, say=say
            )
            if evaluation.fits(SHARE):
                return compiled.Result(one.setting, one.step, evaluation)
    return None


def _walk(mesh: compiled.Setting, limit: int, say: compiled.Say) -> list[Tried]:
    """Along the border of what fits."""
    sizes = micro_batches(mesh)
    found: list[Tried] = []
    policy = size = 0
    while policy < len(POLICIES) and size < len(sizes) and len(found) < limit:
        setting = mesh.changed({"remat": POLICIES[policy], "micro_batch": str(sizes[size])})
        one = _try(setting, say)
        found.append(one)
        if one.fits:
            size += 1
        else:
            policy += 1
    return found


def _try(own: compiled.Setting, say: compiled.Say) -> Tried:
    say(f"search: {' '.join(own.overrides)}")
    try:
        step = compiled.compile_step(own, compiled.TRAIN, explain=False, say=say)
    except compiled.CompilerError as error:
        return Tried(own, None, False, math.inf, str(error))
    if not step.fits(SHARE):
        return Tried(own, step, False, math.inf, "too large")
    estimate = compiled.Result(own, step, None).estimate()
    assert estimate
    return Tried(own, step, True, estimate.step_seconds / own.tokens)


def micro_batches(own: compiled.Setting) -> list[int]:
    """Rows of a forward pass: one a device, then about twice as many each time, as they divide the batch."""
    layout = own.program.layout
    rows = 1 if layout is None else layout.rows
    whole = own.config.batch_size // rows
    fit = [n for n in range(1, whole + 1) if whole % n == 0]
    chosen = [fit[0]]
    for n in fit[1:]:
        if n >= 2 * chosen[-1] or n == whole:
            chosen.append(n)
    return [n * rows for n in chosen]


def meshes(own: compiled.Setting) -> Iterator[compiled.Setting]:
    """Meshes of the devices whose arguments fit, the likely first: as it is, weights copied, tensor 2 and 4, rows split."""
    for change in _mesh_changes(own):
        try:
            other = own.changed({**change, "micro_batch": "0"})
            size = compiled.argument_bytes(other)
        except errors.UserError:  # heads, positions or rows that this mesh does not divide
            continue
        if size <= SHARE * own.on.chip.hbm_bytes:
            yield other


def _mesh_changes(own: compiled.Setting) -> Iterator[dict[str, str]]:
    yield {}
    sizes = sharding.Sizes(**own.config.mesh).over(len(own.on.devices))
    free = sizes.data * sizes.fsdp * sizes.tensor * sizes.context
    if free == 1:
        return
    before = (sizes.data, sizes.fsdp, sizes.tensor, sizes.context)
    contexts = (1, 2, 4) if own.length >= LONG else (1,)
    shapes = [(free, 1, 1, 1), (1, free, 1, 1)]
    shapes += [
        (1, free // (tensor * context), tensor, context)
        for context in contexts
        for tensor in (1, 2, 4)
        if free % (tensor * context) == 0 and tensor * context > 1
    ]
    for shape in shapes:
        if shape != before:
            names = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context")
            yield {
                name: str(new)
                for name, new, old in zip(names, shape, before, strict=True)
                if new != old
            }


def smallest(
    own: compiled.Setting, chip: str, *, say: compiled.Say = compiled.quiet
) -> compiled.Result | None:
    """The smallest topology of a chip on which a configuration fits; None if the largest is too small.

    The batch is rounded up to what the devices divide, and each computes one row at a time, which takes least memory.
    """
    settings = {}
    for name in topology.slices_of(chip):
        on = one_row_each(own, topology.parse(name))
        if on is not None and compiled.argument_bytes(on) <= on.on.chip.hbm_bytes:
            settings[name] = on
    if not settings:
        return None
    say(
        f"smallest {chip}: of {', '.join(settings)}; others are too small for the arguments, or don't divide the model"
    )
    results: dict[str, compiled.Result] = {}

    def fits(change: changes.Changes) -> bool:
        name = change["topology"]
        train = compiled.compile_step(settings[name], compiled.TRAIN, explain=False, say=say)
        if not train.fits():
            return False
        evaluation = compiled.compile_step(
            settings[name], compiled.EVALUATE, explain=False, say=say
        )
        results[name] = compiled.Result(settings[name], train, evaluation)
        return results[name].fits

    found = changes.first_that_fits([{"topology": name} for name in settings], fits)
    return None if found is None else results[found["topology"]]


def one_row_each(own: compiled.Setting, on: topology.Topology) -> compiled.Setting | None:
    """A setting on other devices, with a row at a time on each; None where the model cannot be split over them."""
    other = own.placed(on)
    try:
        rows = 1 if (layout := other.layout()) is None else layout.rows
        up = -(-own.config.batch_size // rows) * rows
        wanted: dict[str, Any] = {"batch_size": str(up), "micro_batch": str(rows)}
        if up == own.config.batch_size:
            del wanted["batch_size"]
        other = other.changed(wanted)
        other.program  # noqa: B018 - raises where the mesh does not divide the model
    except errors.UserError:
        return None
    return other
