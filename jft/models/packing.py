# SPDX-License-Identifier: Apache-2.0
"""One tensor of a file to the codes and scales of a QArray, on the host, piece by piece.

Blocks are independent of each other, so pieces of whole blocks give the bits that the whole gives. They are taken as the
file has them, where a kernel's inputs mostly lie together; what is turned is the codes, a quarter of the bytes or less.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jft import quant
from jft.models import architecture, names, pages, quantizing

_PIECE = 1 << 22  # numbers at a time


def quantized(
    tensor: np.ndarray,
    weight: names.Weight,
    config: architecture.Config,
    how: quantizing.Way,
    gone: int,
) -> quant.QArray | None:
    """A tensor as a QArray of numpy arrays in our layout; None where a value is not finite.

    Args:
      tensor: as the file has it. The pages of a memory map are released after use.
      weight: its row of the table.
      config: of the model.
      how: its leaf is quantised.
      gone: leading dimensions of the leaf that the tensor lacks.
    """
    apart, order = weight.apart(tensor, config), weight.order
    axis, kind, block = order[how.axis], how.kind, how.block
    with jax.default_device(_device()):
        wholes: list[np.ndarray] = []
        for start, piece in _pieces(apart, axis, block):
            finite, *parts = map(np.asarray, _blocks(piece, kind, axis, block))
            if not finite:
                return None
            if not wholes:
                shares = [len(apart) * len(part) // len(piece) for part in parts]
                wholes = [
                    np.empty((n, *x.shape[1:]), x.dtype) for n, x in zip(shares, parts, strict=True)
                ]
            for whole, part in zip(wholes, parts, strict=True):
                at = start * len(whole) // len(apart)
                whole[at : at + len(part)] = part
        codes, scales = (whole.transpose(order) for whole in wholes)
        if how.double:
            scales = jax.tree.map(np.asarray, _doubled(scales, how.stacked - gone))
    return quant.QArray(codes, scales, None, kind, how.axis, block, np.dtype(np.float32))


def _pieces(apart: np.ndarray, axis: int, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Along the first axis, blocks whole, with where each begins."""
    unit = block if axis == 0 else 1
    step = unit * max(1, _PIECE // (unit * math.prod(apart.shape[1:])))
    for start in range(0, len(apart), step):
        piece = apart[start : start + step]
        yield start, piece
        pages.release(piece)


@functools.partial(jax.jit, static_argnames=("kind", "axis", "block"))
def _blocks(
    x: jax.Array, kind: str, axis: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether all is finite, codes, scales. XLA's maximum on a CPU may lose a NaN, so that scales do not tell."""
    x = x.astype(jnp.float32)
    q = quant.quantize(x, kind, axis=axis, block=block)
    return jnp.isfinite(x).all(), q.codes, q.scales


_doubled = jax.jit(quant.doubled, static_argnums=1)


def _device() -> jax.Device:
    """A CPU, where this process may use one; else its first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return jax.local_devices()[0]
