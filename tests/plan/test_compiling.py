# SPDX-License-Identifier: Apache-2.0
"""What a compiled program takes: on CPU, where the reported peak is not it."""

import jax
import jax.numpy as jnp
import pytest

from jft.plan import compiling


def lowered(rows: int) -> jax.stages.Lowered:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return (jnp.tanh(x @ w) @ w.T).sum()

    w, x = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (64, rows))
    return jax.jit(jax.grad(f)).lower(w, x)


def test_the_peak_holds_arguments_and_temporaries() -> None:
    program = compiling.compile_program(lowered(1024))
    w, x = 4 * 64 * 64, 4 * 1024 * 64
    assert program.memory.arguments == w + x
    assert program.memory.temporaries >= x  # tanh(x @ w) is kept for the backward pass
    assert program.memory.peak >= program.memory.arguments + program.memory.temporaries
    assert program.refusal == "" and "ENTRY" in program.text and program.seconds > 0


def test_what_is_not_about_memory_is_raised() -> None:
    with pytest.raises(Exception, match="no_such_option"):
        compiling.compile_program(lowered(8), {"no_such_option": 1})


def test_a_program_that_is_refused_is_read_from_what_the_compiler_leaves() -> None:
    class Refused:
        """A compiler that gives up after it wrote its program down, as the one for TPU does."""

        def __init__(self, text: str) -> None:
            self.text, self.dumped = text, ""

        def compile(self, compiler_options: dict[str, object]) -> object:
            self.dumped = str(compiler_options.get("xla_dump_to", ""))
            if self.dumped:
                with open(f"{self.dumped}/module_0000.f.after_optimizations.txt", "w") as file:
                    file.write(self.text)
            raise RuntimeError("RESOURCE_EXHAUSTED: total memory (92.08G)\nexceeds 15.75G")

    fitting = compiling.compile_program(lowered(1024))
    program = compiling.compile_program(Refused(fitting.text))
    assert program.refusal == "RESOURCE_EXHAUSTED: total memory (92.08G)"
    assert program.executable is None and program.text == fitting.text
    assert program.memory.arguments == fitting.memory.arguments
    # By live ranges instead of the compiler's packing.
    assert program.memory.peak == pytest.approx(fitting.memory.peak, rel=0.05)
    unexplained = Refused(fitting.text)
    assert compiling.compile_program(unexplained, explain=False).text == ""
    assert unexplained.dumped == ""
