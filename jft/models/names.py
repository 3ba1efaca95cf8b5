# SPDX-License-Identifier: Apache-2.0
"""How tensors in files lie in our parameters: the one machinery under every family's table of names.

A table is the only place that knows a family's names. Loading, export and adapter files all go through it, so that
they cannot disagree. A Hugging Face kernel is [out, in]; ours has the inputs first and the heads apart, so that a
contraction is an einsum in the letters of `architecture`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np

from jft import tree
from jft.models import architecture, decoder


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a table: where a tensor of a file goes, and how it is turned.

    Attributes:
      name: the tensor's name in a file, with `{layer}` and `{expert}` where there is one for each.
      path: our parameter, in which those tensors are stacked on leading axes L and E.
      stored: the file's axes as letters; "NH" is one axis of size N * H, head-major.
      axes: our axes, the stacked ones aside.
    """

    name: str
    path: str
    stored: tuple[str, ...]
    axes: str

    @property
    def stacked(self) -> str:
        """The letters of our leading axes that are apart in the file."""
        return "".join(
            letter for part, letter in (("{layer}", "L"), ("{expert}", "E")) if part in self.name
        )

    def stored_shape(self, config: architecture.Config) -> tuple[int, ...]:
        """The shape in a file."""
        sizes = architecture.sizes(config)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.stored)

    def shape(self, config: architecture.Config) -> tuple[int, ...]:
        """Our shape of one tensor, the stacked axes aside."""
        sizes = architecture.sizes(config)
        return tuple(sizes[letter] for letter in self.axes)

    @property
    def order(self) -> tuple[int, ...]:
        """For each of our axes, which of the file's it is, their parts counted one by one."""
        letters = "".join(self.stored)
        return tuple(letters.index(letter) for letter in self.axes)

    def apart(self, tensor: np.ndarray, config: architecture.Config, block: int = 1) -> np.ndarray:
        """One tensor of a file with every axis apart, in the file's order; see `from_file`."""
        sizes = architecture.sizes(config)
        shape = [sizes[letter] for letter in "".join(self.stored)]
        return tensor.reshape(*shape[:-1], shape[-1] // block)

    def from_file(
        self, tensor: np.ndarray, config: architecture.Config, block: int = 1
    ) -> np.ndarray:
        """One tensor of a file as a view in our layout; one number may stand for a block of the file's last axis."""
        return self.apart(tensor, config, block).transpose(self.order)

    def to_file(self, array: np.ndarray, config: architecture.Config) -> np.ndarray:
        """The inverse of `from_file`; of a contiguous array it is a view, for only whole axes move."""
        order = [self.axes.index(letter) for letter in "".join(self.stored)]
        return array.transpose(order).reshape(self.stored_shape(config))


Index = tuple[int, ...]  # into a leaf's stacked axes; () for a leaf that is one tensor


def table(*parts: Iterable[Weight]) -> tuple[Weight, ...]:
    """One table of several; a later row takes the place of an earlier one of the same path."""
    rows = {weight.path: weight for part in parts for weight in part}
    return tuple(rows.values())


def rows(config: architecture.Config, weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """The rows of a family's table whose parameters a model with this configuration has."""
    leaves = tree.flatten(decoder.shapes(config))
    found = tuple(weight for weight in weights if weight.path in leaves)
    nameless = leaves.keys() - {weight.path for weight in found}
    if nameless:  # a family's from_hf and its table disagree
        raise ValueError(f"{config.family}: no name for {sorted(nameless)[0]}")
    return found


def tensors(
    config: architecture.Config, weights: Iterable[Weight]
) -> dict[str, tuple[Weight, Index]]:
    """Every tensor of a file by its name: its row and its index into the leaf."""
    return dict(_tensors(config, tuple(weights)))


@functools.lru_cache(maxsize=16)
def _tensors(
    config: architecture.Config, weights: tuple[Weight, ...]
) -> Mapping[str, tuple[Weight, Index]]:
    sizes, found = architecture.sizes(config), {}
    for weight in rows(config, weights):
        for index in itertools.product(*(range(sizes[letter]) for letter in weight.stacked)):
            places = dict(zip(_places(weight), index, strict=True))
            found[weight.name.format(**places)] = (weight, index)
    return found


def _places(weight: Weight) -> list[str]:
    return [{"L": "layer", "E": "expert"}[letter] for letter in weight.stacked]


def modules(
    config: architecture.Config, weights: Iterable[Weight]
) -> dict[str, tuple[str, int | None]]:
    """Every torch module that an adapter can name: the leaf and the place in its stacked axes, counted through.

    The names are as PEFT's, `model.layers.3.self_attn.q_proj`. Norms are left out: they have a scale, not a kernel;
    so are experts that a file holds as one array, which are no modules. The head is there also when it is tied, so that
    an adapter on it can be refused by name.
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    sizes, found = architecture.sizes(config), {}
    for name, (weight, index) in tensors(untied, weights).items():
        if len(weight.stored) == 2 and name.endswith(".weight"):
            place = None
            if index:
                lengths = [sizes[letter] for letter in weight.stacked]
                place = int(np.ravel_multi_index(index, lengths))
            found[name.removesuffix(".weight")] = (weight.path, place)
    return found


def parameter_count(config: architecture.Config) -> int:
    """How many parameters there are, a tied head counted once."""
    return sum(math.prod(leaf.shape) for leaf in tree.flatten(decoder.shapes(config)).values())


def standard() -> tuple[Weight, ...]:
    """The names of Llama, of which most families have most."""
    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    return (
        Weight("model.embed_tokens.weight", "embed/embedding", ("V", "D"), "VD"),
        norm(layer + "input_layernorm", "layers/attention_norm"),
        *linear(attention + "q_proj", "layers/attention/query", "NH", "D"),
        *linear(attention + "k_proj", "layers/attention/key", "KH", "D"),
        *linear(attention + "v_proj", "layers/attention/value", "KH", "D"),
        *linear(attention + "o_proj", "layers/attention/out", "D", "NH"),
        norm(layer + "post_attention_layernorm", "layers/mlp_norm"),
        *linear(mlp + "gate_proj", "layers/mlp/gate", "F", "D"),
        *linear(mlp + "up_proj", "layers/mlp/up", "F", "D"),
        *linear(mlp + "down_proj", "layers/mlp/down", "D", "F"),
        norm("model.norm", "final_norm"),
        Weight("lm_head.weight", "head/kernel", ("V", "D"), "DV"),
    )


def norm(name: str, path: str, axes: str = "D") -> Weight:
    """The scale of a norm, one axis in the file."""
    return Weight(f"{name}.weight", f"{path}/scale", (axes,), axes)


def linear(name: str, path: str, outputs: str, inputs: str) -> tuple[Weight, Weight]:
    """The kernel and the bias of a torch Linear, [out, in]."""
    kernel = Weight(f"{name}.weight", f"{path}/kernel", (outputs, inputs), inputs + outputs)
    return kernel, Weight(f"{name}.bias", f"{path}/bias", (outputs,), outputs)
