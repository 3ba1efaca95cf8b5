# SPDX-License-Identifier: Apache-2.0
"""Compiles a program and says what memory it takes, also when it takes too much.

The TPU compiler refuses a program that does not fit with one line: the total. What it had made of the program until then
can be written to a folder; read from there, the largest arrays can be named.
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from jft.plan import hlo_memory, hlo_text

_REFUSED = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. The peak is below arguments and temporaries together: not all are alive at once."""

    peak: int
    arguments: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of it."""

    text: str  # the optimised HLO
    memory: Memory
    seconds: float  # to compile
    refusal: str  # the compiler's word if it does not fit, else empty
    executable: Any  # jax.stages.Compiled; None if it does not fit


def compile_program(
    lowered: Any, options: Mapping[str, Any] | None = None, *, explain: bool = True
) -> Program:
    """Compiles what `jax.jit(...).lower(...)` gave.

    Args:
      lowered: jax.stages.Lowered.
      options: of the compiler, as `topology.Topology.compiler_options`.
      explain: where it does not fit, compile again to learn what it is made of; without, its text is empty.

    Returns:
      The program. Of one that does not fit, memory is counted from its live ranges.
    """
    start = time.perf_counter()
    try:
        executable = lowered.compile(compiler_options=dict(options or {}))
    except Exception as error:  # jaxlib's own class, whose module has moved between releases
        if _REFUSED not in str(error):
            raise
        seconds, refusal = time.perf_counter() - start, str(error).strip().split("\n")[0]
        text = _refused_text(lowered, options or {}) if explain else ""
        memory = _counted(text) if text else Memory(0, 0, 0)
        return Program(text, memory, seconds, refusal, None)
    seconds = time.perf_counter() - start
    return Program(executable.as_text(), _reported(executable), seconds, "", executable)


def _reported(executable: Any) -> Memory:
    stats = executable.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = stats.peak_memory_in_bytes
    if (
        peak <= arguments + results + 4096
    ):  # on CPU the reported peak leaves temporaries out; tables of tuples are small
        peak = arguments + temporaries + results
    return Memory(peak, arguments, temporaries)


def _counted(text: str) -> Memory:
    module = hlo_text.parse(text)
    peak = hlo_memory.Liveness(module).peak()
    leaves = [one for own in module.entry.parameters.values() for one in hlo_text.leaves(own.shape)]
    arguments = sum(one.padded_bytes for one in leaves if one.space == hlo_text.DEVICE)
    return Memory(peak.bytes, arguments, peak.bytes - arguments)


def _refused_text(lowered: Any, options: Mapping[str, Any]) -> str:
    """The scheduled program, as the compiler leaves it behind when it gives up; empty if it leaves none."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            lowered.compile(compiler_options={**options, **dump})
        except Exception as error:
            if _REFUSED not in str(error):
                raise
        found = sorted(pathlib.Path(folder).glob("*.after_optimizations.txt"))
        return found[-1].read_text() if found else ""
