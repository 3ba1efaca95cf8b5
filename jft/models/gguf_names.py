# SPDX-License-Identifier: Apache-2.0
"""Names and layouts of tensors in GGUF files, by our parameters' paths, and what llama.cpp's converter does to them.

Four things differ from a plain table. Where llama.cpp turns neighbours, the rows of queries and keys lie in pairs. Gemma's
norms are stored plus one. All experts of a layer are one tensor. gpt-oss's gate and up, one kernel here, are two tensors.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jft.models import architecture, gguf_architectures, names

_LAYER = "blk.{layer}."


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor for every layer, or one in all.

    Attributes:
      weight: its name, our path, the file's axes and ours.
      place: our parameter's index on its last axis that this tensor has; None for the whole.
      paired: the file's first axis is heads whose rows lie in pairs.
      shifted: the file's values are ours plus one.
    """

    weight: names.Weight
    place: int | None = None
    paired: bool = False
    shifted: bool = False

    def tensor(self, layer: int | None) -> str:
        """The tensor's name."""
        return self.weight.name.format(layer=layer)

    def from_file(self, tensor: np.ndarray, c: architecture.Config, block: int = 1) -> np.ndarray:
        """A tensor as our parameter, `place` aside; or one of numbers that stand for blocks of its last axis."""
        if self.paired:
            tensor = _swapped(tensor, (-1, c.head_dim // 2, 2))
        if self.shifted:
            tensor = tensor - 1
        return self.weight.from_file(tensor, c, block)

    def to_file(self, array: np.ndarray, c: architecture.Config) -> np.ndarray:
        """The inverse, of our whole parameter; float32 where the values change."""
        array = array if self.place is None else array[..., self.place]
        tensor = self.weight.to_file(array, c)
        if self.shifted:
            tensor = tensor.astype(np.float32) + np.float32(1)
        return _swapped(tensor, (-1, 2, c.head_dim // 2)) if self.paired else tensor


def _swapped(rows: np.ndarray, apart: tuple[int, int, int]) -> np.ndarray:
    """Rows of each head from pairs (0, H/2, 1, H/2 + 1, ...) to halves (0, 1, ..., H - 1), or back."""
    heads = rows.reshape(*apart, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


@functools.lru_cache(maxsize=16)
def rows(c: architecture.Config) -> tuple[Row, ...]:
    """The rows of every parameter that a model has."""
    own = gguf_architectures.of_family(c.family)
    found = []
    for weight in names.rows(c, _weights(c)):
        part, _, last = weight.path.rpartition("/")
        turned = part in ("layers/attention/query", "layers/attention/key")
        place = {"ffn_gate_exps": 0, "ffn_up_exps": 1}.get(weight.name.split(".")[-2])
        found.append(
            Row(
                weight,
                place=place if part == "layers/experts/gate_up" else None,
                paired=own.paired and turned,
                shifted=c.norm == "rms_plus_one" and last == "scale",
            )
        )
    return tuple(found)


def layers(c: architecture.Config, row: Row) -> list[tuple[int, ...]]:
    """The indices into the leaf, one for each tensor of a row."""
    return [(i,) for i in range(c.num_layers)] if row.weight.stacked else [()]


def _weights(c: architecture.Config) -> Iterator[names.Weight]:
    yield names.Weight("token_embd.weight", "embed/embedding", ("V", "D"), "VD")
    yield names.Weight("position_embd.weight", "positions/embedding", ("P", "D"), "PD")
    yield from _attention("all" if c.qk_norm == "all" else "head")
    yield from _norm(_LAYER + "attn_norm", "layers/attention_norm")
    yield from _norm(_LAYER + "post_attention_norm", "layers/attention_post_norm")
    before = "post_attention_norm" if c.family == "gpt_oss" else "ffn_norm"
    yield from _norm(_LAYER + before, "layers/mlp_norm")
    yield from _norm(_LAYER + "post_ffw_norm", "layers/mlp_post_norm")
    yield from names.linear(_LAYER + "ffn_gate", "layers/mlp/gate", "F", "D")
    yield from names.linear(_LAYER + "ffn_up", "layers/mlp/up", "F", "D")
    yield from names.linear(_LAYER + "ffn_up", "layers/mlp/gate_up", "ZF", "D")
    yield from names.linear(_LAYER + "ffn_down", "layers/mlp/down", "D", "F")
    yield from _experts()
    yield from _norm("output_norm", "final_norm")
    yield names.Weight("output.weight", "head/kernel", ("V", "D"), "DV")


def _attention(qk_norm: str) -> Iterator[names.Weight]:
    name, path = _LAYER + "attn_", "layers/attention/"
    yield from names.linear(name + "q", path + "query", "NH", "D")
    yield from names.linear(name + "k", path + "key", "KH", "D")
    yield from names.linear(name + "v", path + "value", "KH", "D")
    yield from names.linear(name + "qkv", path + "qkv", "XH", "D")
    yield from names.linear(name + "output", path + "out", "D", "NH")
    query, key = ("NH", "KH") if qk_norm == "all" else ("H", "H")
    yield names.Weight(name + "q_norm.weight", path + "query_norm/scale", (query,), query)
    yield names.Weight(name + "k_norm.weight", path + "key_norm/scale", (key,), key)
    yield names.Weight(name + "sinks.weight", path + "sinks", ("N",), "N")


def _norm(name: str, path: str) -> Iterator[names.Weight]:
    yield names.Weight(name + ".weight", path + "/scale", ("D",), "D")
    yield names.Weight(name + ".bias", path + "/bias", ("D",), "D")


def _experts() -> Iterator[names.Weight]:
    yield from names.linear(_LAYER + "ffn_gate_inp", "layers/router", "E", "D")
    for part, path, outputs, inputs in (
        ("gate", "gate", "F", "D"),
        ("up", "up", "F", "D"),
        ("down", "down", "D", "F"),
        ("gate", "gate_up", "F", "D"),
        ("up", "gate_up", "F", "D"),
    ):
        name, own = _LAYER + f"ffn_{part}_exps", f"layers/experts/{path}"
        stored = ("E", outputs, inputs)
        yield names.Weight(name + ".weight", own + "/kernel", stored, "E" + inputs + outputs)
        yield names.Weight(name + ".bias", own + "/bias", ("E", outputs), "E" + outputs)
