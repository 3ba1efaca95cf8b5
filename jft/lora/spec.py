# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: its specification, its factors, and fresh ones.

LoRA (https://arxiv.org/abs/2106.09685) replaces a frozen kernel W by W + scale * A B, with A thin and B flat. Here a
kernel may have any rank; `jft.lora.layouts` says which of its dimensions are batch, inputs and outputs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jft import errors, tree
from jft.lora import dora, layouts

INITIALIZERS = ("kaiming", "gaussian", "embedding")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Which leaves get an adapter, and of what kind. Patterns are regular expressions over whole path names.

    Attributes:
      rank: r, the inner dimension.
      alpha: the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
      targets: the leaves to adapt.
      exclude: of these, the ones to leave alone; "" = none.
      dropout: rate for the input of the low-rank product, where the transformed function is given a key.
      rank_pattern, alpha_pattern: ordered (pattern, value) rules for leaves with another rank or alpha.
      use_rslora: rank-stabilised scale (https://arxiv.org/abs/2312.03732).
      use_dora: a trained magnitude for each output (https://arxiv.org/abs/2402.09353).
      initializer: "kaiming" (A uniform in ±1/sqrt(inputs), B zero: PEFT's default), "gaussian" (A normal with
        deviation 1/r, B zero) or "embedding" (A zero, B normal with deviation 1: PEFT's for lookup tables); or ordered
        (pattern, name) rules that cover every target.
      layouts: ordered (pattern, layout) rules; two-dimensional leaves default to [in, out], others need one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r".*/kernel"
    exclude: str = ""
    dropout: float = 0.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    initializer: str | tuple[tuple[str, str], ...] = "kaiming"
    layouts: tree.Rules = ()

    def __post_init__(self) -> None:
        for rank in (self.rank, *(r for _, r in self.rank_pattern)):
            if rank < 1 or rank != int(rank):
                raise errors.UserError(f"lora.rank={rank}: a whole number, 1 or more")
        if not 0 <= self.dropout < 1:
            raise errors.UserError(f"lora.dropout={self.dropout}: 0 or more, below 1")
        for name in [name for _, name in self.initializers]:
            if name not in INITIALIZERS:
                raise errors.UserError(
                    f"lora.initializer={name!r}: one of {', '.join(INITIALIZERS)}"
                )

    @property
    def initializers(self) -> tuple[tuple[str, str], ...]:
        return (
            ((".*", self.initializer),) if isinstance(self.initializer, str) else self.initializer
        )

    def rank_of(self, path: str) -> int:
        return _first(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        rank, alpha = self.rank_of(path), _first(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _first(rules: tree.Rules, path: str, default: Any) -> Any:
    found = tree.lookup(rules, path)
    return default if found is None else found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "magnitude"],
    meta_fields=["scale", "layout", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter: its leaf W becomes W + scale * A B over the rank, or DoRA's m (W + scale * A B) / |W + scale * A B|.

    Attributes:
      a: [*batch, *inputs, r]
      b: [*batch, r, *outputs]
      scale: a number that is not trained.
      layout: one letter of b, i, o for each dimension of the leaf.
      magnitude: m, [*batch, *outputs]; None without DoRA.
      dropout: rate for the input of the low-rank product.
    """

    a: Any
    b: Any
    scale: float
    layout: str
    magnitude: Any = None
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


Adapters = dict[str, Factors]


def shapes(layout: str, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of A, B and a magnitude for a leaf."""
    batch, inputs, outputs = layouts.split(layout, shape)
    return (*batch, *inputs, rank), (*batch, rank, *outputs), (*batch, *outputs)


def select(spec: Spec, params: Any) -> dict[str, str]:
    """{path: layout} of the leaves that the spec adapts.

    Raises:
      UserError: a pattern matches nothing, or a leaf has no layout.
    """
    leaves = tree.flatten(params)
    paths = tree.match(spec.targets, leaves, "lora.targets")
    if spec.exclude:
        gone = tree.match(spec.exclude, paths, "lora.exclude")
        paths = [path for path in paths if path not in gone]
        if not paths:
            raise errors.UserError(f"lora.exclude={spec.exclude!r} excludes every target")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(spec, name):
            tree.match(pattern, paths, f"lora.{name}")
    return {path: layouts.find(spec.layouts, path, leaves[path].ndim) for path in paths}


def init(spec: Spec, params: Any, *, key: jax.Array) -> Adapters:
    """Fresh adapters: one factor is zero, so the function is unchanged.

    Args:
      spec: which leaves, which kind.
      params: the base's parameters or, without DoRA, their shapes (`jax.ShapeDtypeStruct`).
      key: a typed key.

    Returns:
      {path: Factors}, float32 (float64 for a float64 leaf) whatever the base's dtype: in bfloat16 most entries of A
      never move at usual learning rates. Factors of a leaf with a NamedSharding are sharded like its dimensions.

    Raises:
      UserError: a pattern matches nothing, or a leaf has no layout.
    """
    leaves = tree.flatten(params)
    adapters = {}
    for path, layout in select(spec, params).items():
        key, own = jax.random.split(key)
        adapters[path] = _fresh(spec, path, leaves[path], layout, own)
    return adapters


def _fresh(spec: Spec, path: str, leaf: Any, layout: str, key: jax.Array) -> Factors:
    name = tree.lookup(spec.initializers, path)
    if name is None:
        raise errors.UserError(f"lora.initializer: no rule matches {path}; end with ('.*', ...)")
    rank, scale = spec.rank_of(path), spec.scale_of(path)
    a_shape, b_shape, _ = shapes(layout, leaf.shape, rank)
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    a, b = jnp.zeros(a_shape, dtype), jnp.zeros(b_shape, dtype)
    if name == "kaiming":
        bound = math.prod(layouts.split(layout, leaf.shape)[1]) ** -0.5
        a = jax.random.uniform(key, a_shape, dtype, minval=-bound, maxval=bound)
    elif name == "gaussian":
        a = jax.random.normal(key, a_shape, dtype) / rank
    else:
        b = jax.random.normal(key, b_shape, dtype)
    magnitude = None
    if spec.use_dora:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise errors.UserError(f"DoRA starts from the norms of {path}: init needs its values")
        magnitude = dora.norms(leaf, a, b, scale, layout)
    factors = Factors(a, b, scale, layout, magnitude, spec.dropout)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, jax.NamedSharding):
        return factors
    specs = partition_spec(factors, sharding.spec)
    return jax.tree.map(
        lambda x, p: jax.device_put(x, jax.NamedSharding(sharding.mesh, p)), factors, specs
    )


def neutral(adapters: Mapping[str, Factors], params: Any) -> Adapters:
    """Adapters like these under which the function is the base's: it need not be compiled again without them.

    An update of zero; with DoRA, the norms of the weights as magnitudes, which is the base up to rounding.
    """
    leaves = tree.flatten(params)
    out = {}
    for path, factors in adapters.items():
        a, b = jnp.zeros_like(factors.a), jnp.zeros_like(factors.b)
        magnitude = factors.magnitude
        if magnitude is not None:
            norms = dora.norms(leaves[path], a, b, factors.scale, factors.layout)
            magnitude = norms.astype(magnitude.dtype)
        out[path] = dataclasses.replace(factors, a=a, b=b, magnitude=magnitude)
    return out


def partition_spec(factors: Factors, leaf: jax.P) -> Factors:
    """The PartitionSpecs of the factors, in their places: each dimension is sharded as the leaf's is, RANK never."""
    axes = (*leaf, *(None,) * (len(factors.layout) - len(leaf)))
    batch, inputs, outputs = layouts.split(factors.layout, axes)
    magnitude = None if factors.magnitude is None else jax.P(*batch, *outputs)
    return dataclasses.replace(
        factors,
        a=jax.P(*batch, *inputs, None),
        b=jax.P(*batch, None, *outputs),
        magnitude=magnitude,
    )


def check(adapters: Mapping[str, Factors], params: Any) -> None:
    """Raises UserError unless each adapter has a leaf and the shapes that its layout implies."""
    leaves = tree.flatten(params)
    for path, factors in adapters.items():
        if path not in leaves:
            tree.match(path, leaves, "adapter path")
        if len(factors.layout) != len(leaves[path].shape):
            raise errors.UserError(
                f"adapter {path}: layout {factors.layout!r}, but the leaf has shape {leaves[path].shape}"
            )
        want = shapes(factors.layout, leaves[path].shape, factors.rank)
        got = (factors.a.shape, factors.b.shape)
        if factors.magnitude is not None:
            got = (*got, factors.magnitude.shape)
        if got != want[: len(got)]:
            raise errors.UserError(
                f"adapter {path}: shapes {got} do not fit the leaf, which needs {want[: len(got)]}"
            )


def divided(mesh: Any, spec: jax.P, shape: Sequence[int]) -> jax.P:
    """A spec without the mesh axes that don't divide their dimension."""
    kept = []
    for size, names in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True):
        each = (names,) if isinstance(names, str) else names or ()
        kept.append(None if size % math.prod(mesh.shape[name] for name in each) else names)
    return jax.P(*kept)
