# SPDX-License-Identifier: Apache-2.0
"""The one mesh, and where each array of a run lies on it.

The axes, from the slowest connection to the fastest, and what is split over them:

    slice    rows of a batch, over the data centre's network: one part of the mesh per TPU slice
    data     rows of a batch; weights are copied
    fsdp     rows of a batch, and the storage of weights: a layer's are gathered when it runs
    expert   rows of a batch, storage, and which experts of a mixture a device computes
    context  positions of a row
    tensor   heads and the MLP's inner dimension; and positions of the residual stream between them

Weights are placed by rules (regex -> PartitionSpec) over their paths; an adapter's factors follow their weight, the
optimizer's moments follow what they belong to. On one device there is no mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jft import errors, lora, tree

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
ROWS = ("slice", "data", "fsdp", "expert")  # that split the rows of a batch
STORED = ("fsdp", "expert")  # that split the storage of a weight which all of them compute with
# That split the embedding's dimension and the head's vocabulary; in this order, so that what is split over all of them can
# go over to rows, which the last ones split, by one exchange among those.
WIDE = ("tensor", *STORED)

RULES: tree.Rules = (
    (r"(embed|positions)/embedding", P(None, WIDE)),
    (r"head/kernel", P(None, WIDE)),
    (r"layers/attention/(query|key|value|qkv)/kernel", P(None, STORED, "tensor", None)),
    (r"layers/attention/(query|key|value|qkv)/bias", P(None, "tensor", None)),
    (r"layers/attention/out/kernel", P(None, "tensor", None, STORED)),
    (r"layers/attention/sinks", P(None, "tensor")),
    (r"layers/mlp/(gate|up)/kernel", P(None, STORED, "tensor")),
    (r"layers/mlp/(gate|up)/bias", P(None, "tensor")),
    (r"layers/mlp/gate_up/kernel", P(None, STORED, None, "tensor")),
    (r"layers/mlp/gate_up/bias", P(None, None, "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", STORED)),
    (r"layers/experts/(gate|up)/kernel", P(None, "expert", "fsdp", "tensor")),
    (r"layers/experts/(gate|up)/bias", P(None, "expert", "tensor")),
    (r"layers/experts/gate_up/kernel", P(None, "expert", "fsdp", "tensor", None)),
    (r"layers/experts/gate_up/bias", P(None, "expert", "tensor", None)),
    (r"layers/experts/down/kernel", P(None, "expert", "tensor", "fsdp")),
    (r"layers/experts/down/bias", P(None, "expert", None)),
    (r"layers/router/.*", P()),
    (r".*(norm/(scale|bias)|/bias)", P()),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many devices each axis has; one of them may be -1: all that the others leave."""

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise errors.UserError(f"mesh.{name}={size}: 1 or more, or -1 for what is left")
        left = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(left) > 1:
            raise errors.UserError(
                f"{' and '.join(left)} are -1: one at most can take what is left"
            )

    def over(self, devices: int) -> "Sizes":
        """The same with the -1 filled in, for so many devices."""
        sizes = dataclasses.asdict(self)
        given = math.prod(size for size in sizes.values() if size != -1)
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        if devices % given or (given != devices and -1 not in sizes.values()):
            raise errors.UserError(
                f"mesh ({told or 'all sizes 1'}) does not fit {devices} devices: set mesh.*, one of them -1"
            )
        filled = {k: devices // given if size == -1 else size for k, size in sizes.items()}
        return Sizes(**filled)


def mesh(sizes: Sizes, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh over these devices, in an order that suits their network.

    Raises:
      UserError: the sizes don't fit the number of devices, or the slices that the devices belong to.
    """
    shape = dataclasses.astuple(sizes.over(len(devices)))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise errors.UserError(
                f"mesh.slice={shape[0]}: the devices are of {len(slices)} slices, give that"
            )
        inner = (shape[0] // len(slices), *shape[1:])
        outer = (len(slices), *(1 for _ in shape[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    else:
        placed = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=devices[0].platform == "tpu"
        )
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def layout(sizes: Sizes, devices: Sequence[Any]) -> "Layout | None":
    """Of the mesh over these devices; None on a single one."""
    if len(devices) == 1 and set(dataclasses.astuple(sizes.over(1))) == {1}:
        return None
    return Layout(mesh(sizes, devices))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it.

    Attributes:
      mesh: with all of `AXES`.
      trained: whether the weights themselves get gradients, which are then stored as they are.
    """

    mesh: jax.sharding.Mesh
    trained: bool = False

    def size(self, *axes: str) -> int:
        """Devices along these axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def used(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Those of the axes that have more than one device."""
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def named(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @property
    def replicated(self) -> NamedSharding:
        return self.named(P())

    @property
    def rows(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.size(*ROWS)

    @property
    def batch(self) -> NamedSharding:
        """Of a batch's arrays [B, T]."""
        return self.named(P(self.used(ROWS) or None, self.used(("context",)) or None))

    def constrain(self, x: jax.Array, *axes: Any) -> jax.Array:
        """x with each dimension over the axes given (a name, names or None), as far as they divide it."""
        spec = [self._fitting(x.shape[i], axis) for i, axis in enumerate(axes)]
        return jax.lax.with_sharding_constraint(x, self.named(P(*spec)))

    def _fitting(self, size: int, axes: Any) -> tuple[str, ...] | None:
        names = self.used((axes,) if isinstance(axes, str) else axes or ())
        return names if names and size % self.size(*names) == 0 else None

    def along(self, T: int) -> tuple[str, ...]:
        """Axes over which the residual stream's positions are split: over `tensor` too, where it divides them."""
        both = ("context", "tensor")
        return self.used(both if T % self.size(*both) == 0 else ("context",))

    def stream(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream between a layer's parts."""
        return self.constrain(x_BTD, ROWS, self.along(x_BTD.shape[1]), None)

    def spec(self, path: str, shape: Sequence[int]) -> P:
        """Where a weight is stored, by the first rule that matches its path.

        A dimension that the storage axes don't divide leaves them to the largest other one that they do.

        Raises:
          UserError: no dimension can be divided so.
        """
        rule = tree.lookup(RULES, path)
        if rule is None:
            raise errors.UserError(f"{path}: no sharding rule is for it")
        return _fitted(self.mesh, rule, path, tuple(shape))

    def computed(self, path: str, shape: Sequence[int]) -> P:
        """Where a weight is when its layer computes with it: gathered over the axes that only store it."""
        gathered = ("fsdp",) if "/experts/" in path else STORED
        return P(*(self._without(axes, gathered) for axes in self.spec(path, shape)))

    def _without(self, axes: Any, gone: Sequence[str]) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name not in gone) or None

    def gather(self, w: jax.Array, path: str) -> jax.Array:
        """A layer's weight (a slice of the stacked one) as the layer computes with it."""
        shape = (1, *w.shape)
        stored, computed = (P(*f(path, shape)[1:]) for f in (self.spec, self.computed))
        if self.trained:
            return _gathered(self.named(stored), self.named(computed), w)
        # Not behind a rule of its own: the LoRA transform follows a constraint, and the factors with it.
        return jax.lax.with_sharding_constraint(w, self.named(computed))

    def weight(self, path: str, leaf: Any) -> Any:
        """The sharding of a parameter (an array or its shape), or those of a quantised one's arrays: what `models.load` asks."""
        spec = self.spec(path, leaf.shape)
        if not tree.is_quantized(leaf):
            return self.named(spec)
        return jax.tree.map(lambda x: self.named(lora.divided(self.mesh, spec, x.shape)), leaf)

    def trainable(self, shapes: Any, params: Any) -> Any:
        """Shardings of a trainable tree: of adapters over `params`, or of the parameters themselves."""
        leaves = tree.flatten(params)
        if not is_adapters(shapes):
            return self.weights(shapes)
        specs = {
            path: lora.partition_spec(factors, self.spec(path, leaves[path].shape))
            for path, factors in shapes.items()
        }
        batch = {path: factors.layout.count("b") for path, factors in shapes.items()}
        return {
            path: jax.tree.map(
                lambda spec, x, first=batch[path]: self.named(self._spread(spec, x.shape, first)),
                specs[path],
                factors,
                is_leaf=lambda x: isinstance(x, P),
            )
            for path, factors in shapes.items()
        }

    def _spread(self, spec: P, shape: Sequence[int], first: int) -> P:
        """The spec of a factor; one without the dimension that its weight is stored by is stored by its largest.

        Such factors (B of `up`, A of `down`) are half of an adapter: on 16 devices their copies and moments would take 0.3
        GB of an 8B model's 1.3.
        """
        axes = [((x,) if isinstance(x, str) else x or ()) for x in spec]
        axes += [()] * (len(shape) - len(axes))
        free = tuple(axis for axis in self.used(STORED) if axis not in sum(axes, ()))
        fit = [
            i
            for i in range(first, len(shape))
            if shape[i] % (self.size(*axes[i]) * self.size(*free)) == 0
        ]
        if free and fit:
            largest = max(fit, key=lambda i: shape[i])
            axes[largest] = (*axes[largest], *free)
        return P(*(names or None for names in axes))

    def weights(self, params: Any) -> Any:
        """The sharding of each parameter; an empty tree has none."""
        return tree.unflatten(
            {path: self.weight(path, leaf) for path, leaf in tree.flatten(params).items()}
        )

    def moments(self, optimizer: optax.GradientTransformation, state: Any, trainable: Any) -> Any:
        """Shardings of an optimizer's state: each moment lies with its parameter, counters everywhere."""
        return optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            state,
            trainable,
            transform_non_params=lambda _: self.replicated,
        )

    def host_rows(self, batch_size: int) -> tuple[int, int]:
        """(which part, of how many) of a batch's rows this process's devices hold.

        Raises:
          UserError: the batch can't be split so, or the rows of a process don't lie together.
        """
        self.check_rows("batch_size", batch_size)
        held = self.batch.addressable_devices_indices_map((batch_size, self.size("context")))
        spans = sorted({index[0].indices(batch_size)[:2] for index in held.values()})
        start, stop = spans[0][0], spans[-1][1]
        together = sum(b - a for a, b in spans) == stop - start
        if not together or start % (stop - start) or batch_size % (stop - start):
            raise errors.UserError(
                "mesh.*: the rows of this process's devices don't lie together; order the axes otherwise"
            )
        return start // (stop - start), batch_size // (stop - start)

    def check_rows(self, key: str, rows: int) -> None:
        """Raises UserError unless so many rows can be split over the mesh."""
        if rows % self.rows:
            up = -(-rows // self.rows) * self.rows
            raise errors.UserError(
                f"{key}={rows} is not divisible by the {self.rows} devices that share its rows: use {up}"
            )

    def put(
        self, batch: Mapping[str, np.ndarray], first_row: int, rows: int
    ) -> dict[str, jax.Array]:
        """A batch on the mesh, of which this process gives its rows from `first_row` on, of `rows` in all."""
        return {name: self._put(x, first_row, rows) for name, x in batch.items()}

    def _put(self, x: np.ndarray, first_row: int, rows: int) -> jax.Array:
        shape = (rows, *x.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return x[start - first_row : stop - first_row, index[1]]

        return jax.make_array_from_callback(shape, self.batch, part)


def is_adapters(trainable: Any) -> bool:
    """Whether a trainable tree is of adapters by path, not a model's own parameters."""
    return bool(trainable) and all("/" in key for key in trainable)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(stored: NamedSharding, computed: NamedSharding, w: jax.Array) -> jax.Array:
    """w gathered, and its gradient scattered: a constraint's own gradient would be summed whole on every device."""
    return jax.lax.with_sharding_constraint(w, computed)


def _gathered_fwd(stored: NamedSharding, computed: NamedSharding, w: jax.Array) -> Any:
    return jax.lax.with_sharding_constraint(w, computed), None


def _gathered_bwd(stored: NamedSharding, computed: NamedSharding, _: None, g: jax.Array) -> Any:
    return (jax.lax.with_sharding_constraint(g, stored),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


@functools.cache
def _fitted(on: jax.sharding.Mesh, rule: P, path: str, shape: tuple[int, ...]) -> P:
    spec: list[tuple[str, ...]] = []
    homeless: tuple[str, ...] = ()
    for size, axes in zip(shape, (*rule, *(None,) * (len(shape) - len(rule))), strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        names = tuple(name for name in names if on.shape[name] > 1)
        if size % math.prod(on.shape[name] for name in names):
            homeless += tuple(name for name in names if name in STORED)
            names = tuple(name for name in names if name not in STORED)
        for name in names:
            if size % on.shape[name]:
                raise errors.UserError(
                    f"mesh.{name}={on.shape[name]} does not divide a dimension of {size} of {path} {list(shape)}"
                )
        spec.append(names)
    if homeless:
        count = math.prod(on.shape[name] for name in homeless)
        # Not the layers' dimension, which the scan goes over.
        free = range(1 if path.startswith("layers/") else 0, len(shape))
        fit = [i for i in free if not spec[i] and shape[i] % count == 0]
        if not fit:
            told = " x ".join(f"mesh.{name}={on.shape[name]}" for name in homeless)
            raise errors.UserError(f"{told} divides no dimension of {path} {list(shape)}")
        spec[max(fit, key=lambda i: shape[i])] = homeless
    return P(*(names or None for names in spec))
