# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: its specification, its factors, and the arithmetic of one update.

LoRA (https://arxiv.org/abs/2106.09685) replaces a frozen kernel W by W + scale * A B, with A thin and B flat. Here a
kernel may have any rank. Its *layout* says what each dimension is: `b` a batch of independent kernels (stacked
layers, experts), `i` input, `o` output. "bioo" is [layers, D, heads, H]: A is [layers, D, r], B [layers, r, heads, H].
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import errors, tree

# Layouts of names that the common libraries use, for leaves that no rule of the caller's names.
DEFAULT_LAYOUTS: dict[int, str] = {2: "io"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Which leaves get an adapter, and of what kind.

    Attributes:
      rank: r, the inner dimension.
      alpha: the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
      targets: a regular expression that must match a leaf's whole path name.
      use_rslora: rank-stabilised scale (https://arxiv.org/abs/2312.03732).
      layouts: ordered (regex, layout) rules; two-dimensional leaves default to "io", others need a rule.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r".*/kernel"
    use_rslora: bool = False
    layouts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise errors.UserError(f"lora.rank={self.rank}: it must be 1 or more")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale", "layout"]
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter: the update of its leaf is scale * A B over the rank.

    Attributes:
      a: [*batch, *inputs, r]
      b: [*batch, r, *outputs]
      scale: a number that is not trained.
      layout: one letter of b, i, o for each dimension of the leaf.
    """

    a: Any
    b: Any
    scale: float
    layout: str

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


Adapters = dict[str, Factors]


def layout_of(spec: Spec, path: str, ndim: int) -> str:
    """The layout of a leaf by the spec's rules; an error when none says, or when it has another rank."""
    layout = tree.lookup(spec.layouts, path) or DEFAULT_LAYOUTS.get(ndim)
    if layout is None:
        raise errors.UserError(
            f"{path} has {ndim} dimensions and no layout: add (regex, layout) to layouts, one letter"
            " for each dimension (b batch, i input, o output), e.g. 'bio' for stacked kernels"
        )
    if len(layout) != ndim or set(layout) - set("bio") or not {"i", "o"} <= set(layout):
        raise errors.UserError(
            f"layout {layout!r} does not fit {path} of {ndim} dimensions: one letter of b, i, o for"
            " each, with an i and an o"
        )
    return layout


def _shapes(layout: str, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
    batch, inputs, outputs = (
        tuple(n for n, kind in zip(shape, layout, strict=True) if kind == letter)
        for letter in "bio"
    )
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def init(spec: Spec, params: Any, *, key: jax.Array) -> Adapters:
    """Fresh adapters: A uniform in ±1/sqrt(inputs) as PEFT's default, B zero, so the function is unchanged.

    Args:
      spec: which leaves, which rank.
      params: the base's parameters or their shapes (`jax.ShapeDtypeStruct`).
      key: a typed key.

    Returns:
      {path: Factors}, float32 (float64 for a float64 leaf) whatever the base's dtype: in bfloat16 most entries of A
      never move at usual learning rates.

    Raises:
      UserError: no leaf matches, or a leaf has no layout.
    """
    leaves = tree.flatten(params)
    adapters = {}
    for path in tree.match(spec.targets, leaves, "lora.targets"):
        leaf = leaves[path]
        layout = layout_of(spec, path, leaf.ndim)
        a_shape, b_shape = _shapes(layout, leaf.shape, spec.rank)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        key, a_key = jax.random.split(key)
        bound = (
            math.prod(n for n, kind in zip(leaf.shape, layout, strict=True) if kind == "i") ** -0.5
        )
        a = jax.random.uniform(a_key, a_shape, dtype, minval=-bound, maxval=bound)
        adapters[path] = Factors(a, jnp.zeros(b_shape, dtype), spec.scale, layout)
    return adapters


def check(adapters: Mapping[str, Factors], params: Any) -> None:
    """Raises UserError unless each adapter has a leaf and the shapes that its layout implies."""
    leaves = tree.flatten(params)
    for path, factors in adapters.items():
        if path not in leaves:
            tree.match(path, leaves, "adapter path")
        want = _shapes(factors.layout, leaves[path].shape, factors.rank)
        got = (tuple(factors.a.shape), tuple(factors.b.shape))
        if want != got:
            raise errors.UserError(
                f"adapter {path}: shapes {got} do not fit the leaf, which needs {want}"
            )


def delta(factors: Factors) -> jax.Array:
    """scale * A B, with the leaf's shape, in the adapter's dtype."""
    letters = "abcdefghijklmnopq"[: len(factors.layout)]
    a, b = (
        "".join(c for c, kind in zip(letters, factors.layout, strict=True) if kind == k)
        for k in "io"
    )
    batch = "".join(c for c, kind in zip(letters, factors.layout, strict=True) if kind == "b")
    product = jnp.einsum(f"{batch}{a}r,{batch}r{b}->{letters}", factors.a, factors.b)
    return factors.scale * product


def merge(params: Any, adapters: Mapping[str, Factors]) -> Any:
    """The parameters with each update added, summed in at least float32 and rounded once to the leaf's dtype."""
    check(adapters, params)
    leaves = tree.flatten(params)
    merged = {}
    for path, factors in adapters.items():
        wide = jnp.promote_types(leaves[path].dtype, factors.a.dtype)
        merged[path] = (leaves[path].astype(wide) + delta(factors)).astype(leaves[path].dtype)
    return tree.replace(params, merged)
