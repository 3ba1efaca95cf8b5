# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model are quantised, how, and along which dimension their blocks run.

Kernels of attention, MLP and experts are; norms, biases and the router stay as they are. The embedding and the head have
a setting of their own: errors in the head go straight into the logits.
"""

import dataclasses
from typing import Any

import jax

from jft import errors, quant, tree
from jft.lora import layouts
from jft.models import architecture

NONE = "none"
KEYS = ("quantize", "quantize_embeddings")  # of the configuration's `model`
EMBEDDING_KINDS = (NONE, "int8")
_EMBEDDINGS = r"embed/embedding|head/kernel"
_KERNELS = r"layers/(attention|mlp|experts)/\w+/kernel"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What becomes of a model's weights.

    Attributes:
      kind: of the layers' kernels: NONE or one of `quant.KINDS`.
      embeddings: of the embedding and the head: one of EMBEDDING_KINDS.
    """

    kind: str = NONE
    embeddings: str = NONE

    def __bool__(self) -> bool:
        return (self.kind, self.embeddings) != (NONE, NONE)

    def __str__(self) -> str:
        return f"quantize={self.kind} and quantize_embeddings={self.embeddings}"

    def replaced(self, kind: str | None, embeddings: str | None) -> "Settings":
        """The same with the values that are given."""
        return Settings(
            self.kind if kind is None else kind,
            self.embeddings if embeddings is None else embeddings,
        )

    def check(self) -> None:
        """Raises UserError for a kind that there is not."""
        for key, value, kinds in (
            ("model.quantize", self.kind, (NONE, *quant.KINDS)),
            ("model.quantize_embeddings", self.embeddings, EMBEDDING_KINDS),
        ):
            if value not in kinds:
                raise errors.UserError(f"{key}={value!r}: one of {', '.join(kinds)}")


DENSE = Settings()


@dataclasses.dataclass(frozen=True)
class Way:
    """How one leaf is quantised: arguments of `quant.quantize`."""

    kind: str
    axis: int
    block: int
    double: bool
    stacked: int

    def __call__(self, x: jax.Array, *, gone: int = 0) -> quant.QArray:
        """The leaf, or one of the arrays that are stacked in it, without the first `gone` dimensions."""
        return quant.quantize(
            x,
            self.kind,
            axis=self.axis,
            block=self.block,
            double=self.double,
            stacked=self.stacked - gone,
        )


def kind(path: str, to: Settings) -> str:
    """What the leaf of this path is quantised to, or NONE."""
    return tree.lookup(((_KERNELS, to.kind), (_EMBEDDINGS, to.embeddings)), path) or NONE


def way(path: str, shape: tuple[int, ...], to: Settings, block: int = quant.BLOCK) -> Way | None:
    """How the leaf of this path and shape is quantised; None where it stays as it is.

    Blocks run along the inputs of a kernel, the last of them that holds whole blocks (as in bitsandbytes and GGUF, whose
    kernels have them last), along its outputs where no input does, and along an embedding's rows.

    Raises:
      UserError: no dimension is a multiple of the block.
    """
    own = kind(path, to)
    if own == NONE:
        return None
    layout = layouts.find(architecture.LAYOUTS, path, len(shape))
    if path == "embed/embedding":
        layout = "oi"  # as a head that is tied to it
    axes = [i for letter in "io" for i in reversed(range(len(shape))) if layout[i] == letter]
    fit = [i - len(shape) for i in axes if shape[i] % block == 0]
    if not fit:
        sizes = " and ".join(str(shape[i]) for i in axes)
        raise errors.UserError(
            f"model.quantize={own}: {path} {list(shape)} has dimensions of {sizes}, and none is a multiple of a block of {block}"
        )
    return Way(own, fit[0], block, own == "nf4", layout.count("b"))


def shapes(params: Any, to: Settings) -> Any:
    """Shapes of a model's parameters, those that are quantised as QArrays of shapes."""
    return tree.unflatten({path: shape(path, x, to) for path, x in tree.flatten(params).items()})


def shape(path: str, x: jax.ShapeDtypeStruct, to: Settings) -> Any:
    """The shape of one parameter, or those of its QArray."""
    how = way(path, x.shape, to)
    return x if how is None else jax.eval_shape(how, x)
