# SPDX-License-Identifier: Apache-2.0
"""Compiles the training and the evaluation step of one setting for a topology, and measures what came out.

The programs are those that `jft train` runs (`jft.program`), from shapes alone. What a device's memory cannot hold the
compiler refuses with one line and no breakdown; the same program is then compiled for a chip with more memory, to tell what
it would take.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import config_dict

from jft import config as configuration
from jft import errors, models, program, sharding, tree
from jft.models import architecture, decoder
from jft.plan import chips, hlo, roofline, topology

TRAIN, EVALUATE = "training", "evaluation"
BACKENDS = {"tpu": "tpu", "cuda": "gpu", "cpu": "cpu"}
STEPS = 1000  # of a schedule whose length is not known: it changes constants only

Say = Callable[[str], None]  # told what goes on


def quiet(_: str) -> None:
    """Tells nobody."""


class CompilerError(errors.UserError):
    """The compiler refuses a program, for another reason than device memory."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compiled: a complete configuration, a model and devices.

    Attributes:
      length: positions of a row in training.
      eval_length: in evaluation.
      steps: of the run.
      changes: what this setting has in other values than the configuration that the user gave, as {key: text of a flag}.
    """

    config: config_dict.ConfigDict
    model: architecture.Config
    on: topology.Topology
    length: int
    eval_length: int
    steps: int
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def changed(self, changes: Mapping[str, str]) -> "Setting":
        """The same with other values of some keys."""
        config = config_dict.ConfigDict(self.config.to_dict())
        for key, text in changes.items():
            configuration.override(config, key, text)
        return dataclasses.replace(self, config=config, changes={**self.changes, **changes})

    def placed(self, on: topology.Topology) -> "Setting":
        return dataclasses.replace(self, on=on)

    @property
    def overrides(self) -> list[str]:
        """Flags to paste."""
        return [f"--config.{key}={text}" for key, text in self.changes.items()]

    def layout(self) -> sharding.Layout | None:
        """As `jft train` makes it on these devices."""
        sizes = sharding.Sizes(**self.config.mesh)
        if len(self.on.devices) == 1 and set(dataclasses.astuple(sizes.over(1))) == {1}:
            return None
        return sharding.Layout(sharding.mesh(sizes, self.on.devices))

    @functools.cached_property
    def program(self) -> program.Program:
        """Raises UserError for settings that don't fit each other, the model or the mesh."""
        c = self.config
        return program.build(
            c,
            self.model,
            layout=self.layout(),
            backend=BACKENDS[self.on.chip.platform],
            length=self.length,
            steps=self.steps,
        )

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.config.batch_size * self.length


def setting(
    config: config_dict.ConfigDict, model: architecture.Config, on: topology.Topology
) -> Setting:
    """A configuration on a topology. Several slices are the mesh's axis `slice`, if it says nothing of them.

    Raises:
      UserError: rows are longer than the model's positions, or the dtype is none.
    """
    models.check_dtype(config.model.dtype)
    if config.data.max_length > model.max_length:
        raise errors.UserError(
            f"data.max_length={config.data.max_length}: the model has {model.max_length} positions"
        )
    length = config.data.max_length
    own = Setting(config, model, on, length, length, config.steps or STEPS)
    if on.slices > 1 and config.mesh.slice == 1:
        own = own.changed({"mesh.slice": str(on.slices)})
    return own


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by the compiler's own account."""

    arguments: int
    temporaries: int
    results: int  # that take no argument's place
    peak: int
    host: int  # in the host's memory: what was moved away to wait there

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, platform: str) -> "Memory":
        found = compiled.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        most = found.argument_size_in_bytes + results + found.temp_size_in_bytes
        # The peak of CPU programs leaves temporaries out; with arrays that wait in the host's memory it may count those too.
        peak = most if platform == "cpu" else min(most, found.peak_memory_in_bytes)
        return cls(
            arguments=found.argument_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            results=results,
            peak=peak,
            host=found.host_temp_size_in_bytes + found.host_argument_size_in_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled program.

    Attributes:
      on: what it was compiled for.
      mesh: sizes of its axes.
      refused: the compiler's line where the program did not fit; the rest then tells of the same program on `on`.
      compiled: None where it was not asked for, or nothing is large enough.
    """

    what: str  # TRAIN, EVALUATE
    on: topology.Topology
    mesh: Mapping[str, int]
    compiled: jax.stages.Compiled | None
    seconds: float  # that tracing and compiling took
    refused: str = ""

    @functools.cached_property
    def memory(self) -> Memory | None:
        return self.compiled and Memory.of(self.compiled, self.on.chip.platform)

    @functools.cached_property
    def text(self) -> str:
        """The optimised program."""
        return self.compiled.as_text() or "" if self.compiled else ""

    @functools.cached_property
    def analysis(self) -> hlo.Analysis | None:
        return hlo.analyse(self.text, self.mesh) if self.compiled else None

    def fits(self, share: float = 1.0) -> bool:
        """Within so much of the memory there is."""
        if self.refused or self.memory is None:
            return False
        return self.memory.peak <= share * self.on.chip.hbm_bytes


def compile_step(own: Setting, what: str, *, explain: bool = True, say: Say = quiet) -> Step:
    """Compiles one step of a setting.

    Args:
      own: the setting.
      what: TRAIN or EVALUATE.
      explain: whether a program that does not fit is compiled again for a chip with more memory.
      say: is told what goes on.

    Raises:
      UserError: settings that don't fit each other, the model or the mesh; or the compiler refuses.
    """
    refused, spent = "", 0.0
    for on in (own.on, *(larger(own.on) if explain else ())):
        say(f"compiling the {what} step for {on.name}")
        began = time.perf_counter()
        compiled, mesh, line = _attempt(own.placed(on), what)
        spent += time.perf_counter() - began
        refused = refused or line
        if compiled is not None:
            return Step(what, on, mesh, compiled, spent, refused)
    return Step(what, own.on, {}, None, spent, refused)


def _attempt(own: Setting, what: str) -> tuple[jax.stages.Compiled | None, Mapping[str, int], str]:
    """(the program, its mesh, the line that tells of too little memory)."""
    built = own.program
    mesh = dict.fromkeys(sharding.AXES, 1) if built.layout is None else built.layout.mesh.shape
    device = own.on.devices[0] if built.layout is None else None
    if what == EVALUATE:
        lowered = dataclasses.replace(built, length=own.eval_length).lower_eval(device)
    else:
        lowered = built.lower_train(device)
    try:
        return lowered.compile(compiler_options=own.on.compiler_options or None), mesh, ""
    except jax.errors.JaxRuntimeError as error:
        return None, mesh, _out_of_memory(error, own.on)


def _out_of_memory(error: Exception, on: topology.Topology) -> str:
    """The line that tells of too little device memory; anything else is an error."""
    line = str(error).strip().split("\n")[0]
    if "RESOURCE_EXHAUSTED" in line and re.search(r"\bhbm\b", line, re.IGNORECASE):
        return line
    raise CompilerError(f"the compiler for {on.name}: {line}") from error


# Chips to compile for what does not fit, by memory; what the other chips have lies between or beyond.
_ROOMY = ("v6e", "v5p", "h200")


def larger(on: topology.Topology) -> list[topology.Topology]:
    """Topologies of as many devices of chips with more memory, the nearest first."""
    found = []
    for chip in map(chips.chip, _ROOMY):
        if chip.platform != on.chip.platform or chip.hbm_bytes <= on.chip.hbm_bytes:
            continue
        each = len(on.devices) // on.slices
        for name in topology.slices_of(chip.name):
            sizes = map(int, name.partition(":")[2].split("x"))
            if math.prod(sizes) * chip.devices_per_chip == each:
                found.append(topology.parse(f"{on.slices}*{name}" if on.slices > 1 else name))
                break
    return found


@dataclasses.dataclass(frozen=True)
class Result:
    """A setting, compiled."""

    setting: Setting
    train: Step
    evaluation: Step | None

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.train,) if self.evaluation is None else (self.train, self.evaluation)

    @property
    def fits(self) -> bool:
        return all(step.fits() for step in self.steps)

    @property
    def ideal_flops(self) -> float:
        return ideal_flops(self.setting)

    def estimate(self) -> roofline.Estimate | None:
        """Of the training step on the setting's own devices; None where nothing could be compiled."""
        analysis, on = self.train.analysis, self.setting.on
        if analysis is None:
            return None
        return roofline.estimate(
            flops=analysis.flops.total,
            traffic=analysis.traffic,
            collectives=analysis.collectives,
            on=on,
            tokens=self.setting.tokens,
            network_axes=("slice",) if on.slices > 1 else (),
        )


def compile_setting(
    own: Setting, *, evaluation: bool = True, explain: bool = True, say: Say = quiet
) -> Result:
    """Both steps of a setting; see `compile_step`. With remat "auto": by the first policy with which training fits."""
    *others, last = program.policies(own.config, BACKENDS[own.on.chip.platform])
    for policy in others:
        with_policy = own.changed({"remat": policy})
        train = compile_step(with_policy, TRAIN, explain=False, say=say)
        if train.fits():
            break
    else:
        with_policy = own if own.config.remat == last else own.changed({"remat": last})
        train = compile_step(with_policy, TRAIN, explain=explain, say=say)
    own = with_policy
    evaluated = compile_step(own, EVALUATE, explain=explain, say=say) if evaluation else None
    return Result(own, train, evaluated)


def ideal_flops(own: Setting) -> float:
    """Of a training step on one device, if nothing were computed twice.

    Per token 2 N forward and 2 N backward through weights that are frozen, 6 N where they train, with N all parameters that
    the token goes through; attention's own products and the adapters' are not among them.
    """
    each = 4 if own.config.lora.rank else 6
    return each * active_parameters(own.model) * own.tokens / len(own.on.devices)


def active_parameters(model: architecture.Config) -> int:
    """Parameters that a token goes through."""
    total = 0
    for path, leaf in tree.flatten(decoder.shapes(model)).items():
        chosen = model.experts if "/experts/" in path else None
        total += leaf.size * chosen.top_k // chosen.count if chosen else leaf.size
    return total


def argument_bytes(own: Setting) -> int:
    """Bytes of the training step's arguments on one device, without compiling anything."""
    built = own.program
    leaves: list[Any] = jax.tree.leaves((built.state, built.frozen, built.batch(built.batch_size)))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in leaves
    )
