# SPDX-License-Identifier: Apache-2.0
"""Compiles the training and the evaluation step of one setting for a topology, and measures what came out.

The programs are those that `jft train` runs (`jft.program`), from shapes alone.
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
from jft.plan import compiling, hlo, roofline, topology

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
      params: shapes of the model's parameters, where they are not what the configuration alone says (`models.shapes`).
    """

    config: config_dict.ConfigDict
    model: architecture.Config
    on: topology.Topology
    length: int
    eval_length: int
    steps: int
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    params: Any = None

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
        return sharding.layout(sharding.Sizes(**self.config.mesh), self.on.devices)

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
            params=self.params,
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
class Step:
    """One compiled program, or one that the compiler refused for want of device memory."""

    what: str  # TRAIN, EVALUATE
    hbm_bytes: int  # that a device has
    mesh: Mapping[str, int]
    program: compiling.Program
    seconds: float  # that tracing and compiling took

    @property
    def memory(self) -> compiling.Memory | None:
        """By the compiler's account; of a refused program counted from its text, and None if that was not asked for."""
        return self.program.memory if self.program.text else None

    @property
    def host_bytes(self) -> int:
        """In the host's memory: what was moved away to wait there."""
        return self.program.memory.host

    @functools.cached_property
    def analysis(self) -> hlo.Analysis | None:
        return hlo.analyse(self.program.text, self.mesh) if self.program.text else None

    def fits(self, share: float = 1.0) -> bool:
        """Within so much of the memory there is."""
        return not self.program.refusal and self.program.memory.peak <= share * self.hbm_bytes


def compile_step(own: Setting, what: str, *, explain: bool = True, say: Say = quiet) -> Step:
    """Compiles one step of a setting.

    Args:
      own: the setting.
      what: TRAIN or EVALUATE.
      explain: whether to find out what a program that does not fit would take.
      say: is told what goes on.

    Raises:
      UserError: settings that don't fit each other, the model or the mesh; or the compiler refuses.
    """
    began = time.perf_counter()
    built = own.program
    say(f"compiling the {what} step for {own.on.name}")
    mesh = dict.fromkeys(sharding.AXES, 1) if built.layout is None else built.layout.mesh.shape
    device = own.on.devices[0] if built.layout is None else None
    if what == EVALUATE:
        lowered = dataclasses.replace(built, length=own.eval_length).lower_eval(device)
    else:
        lowered = built.lower_train(device)
    try:
        found = compiling.compile_program(lowered, own.on.compiler_options, explain=explain)
    except jax.errors.JaxRuntimeError as error:
        raise CompilerError(f"the compiler for {own.on.name}: {_first_line(error)}") from error
    if found.refusal and not re.search(r"\bhbm\b", found.refusal, re.IGNORECASE):
        # A kernel that wants more of the chip's own fast memory than there is.
        raise CompilerError(f"the compiler for {own.on.name}: {found.refusal}")
    return Step(what, own.on.chip.hbm_bytes, mesh, found, time.perf_counter() - began)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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
        """Of the training step on the setting's own devices; None where it was refused."""
        analysis, on = self.train.analysis, self.setting.on
        if analysis is None or self.train.program.refusal:
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
