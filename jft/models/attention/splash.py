# SPDX-License-Identifier: Apache-2.0
"""Attention on TPU: JAX's splash attention, a Pallas kernel that skips the blocks which the mask leaves empty.

Keys and values stay as few as they are (GQA), the mask is computed in the kernel, and the weights never leave the
chip's vector memory. Heads of any size compile. Lengths are in whole blocks: rows are filled up to them here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jft.models import architecture
from jft.models.attention import blocks, plain

LANES = 128  # of a TPU's vectors: lengths are multiples
BLOCK = 512  # queries and keys of a block at most: what MaxText takes by default, too
# Of the keys at most in a fused backward pass. Each part takes a copy of the gradient of the queries; at 8,192 tokens 8 parts of
# 1,024 need 8 % fewer operations than 4 of 2,048.
PARTS = 8
# Bytes of one part's keys at most: with all buffers of the kernel they then fit the 16 MiB of a v4's vector memory.
PART_BYTES = 2**19


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of filled rows and of blocks; `fused`: whether the backward pass is one kernel or two.

    One kernel needs 5 products of blocks where two need 7, but writes the queries' gradient once for each part of the
    keys. So its parts are few and long, which wastes more at the edges of a window.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    block_k_backward: int
    fused: bool


def sizes(queries: int, keys: int, H: int, dtype: Any, window: int | None) -> Sizes:
    """Those for so many queries and keys: the backward pass with the fewer flops of those that fit."""
    (queries, block_q), (keys, block_k) = _filled(queries), _filled(keys)
    count = keys // block_k
    part = block_k * next(n for n in range(-(-count // PARTS), count + 1) if count % n == 0)
    apart = Sizes(queries, keys, block_q, block_k, block_k, False)
    fused = Sizes(queries, keys, block_q, block_k, part, True)
    if part * max(H, LANES) * jnp.dtype(dtype).itemsize > PART_BYTES:
        return apart
    return min(fused, apart, key=lambda own: sum(flops(own, 1, 1, 1, window, None)[1:]))


def fits(queries: int, keys: int) -> bool:
    """Whether a part of a row whose place is known only as it runs is of whole blocks."""
    return (_filled(queries)[0], _filled(keys)[0], keys % queries) == (queries, keys, 0)


def attend(
    c: architecture.Config,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    window: int | None,
    start: jax.Array | int,
    sinks_N: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    """As `attention.attend`; a traced `start` is a multiple of T, and what `fits` says holds."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q_BTNH.shape
    own = sizes(T, k_BSKH.shape[1], H, k_BSKH.dtype, window)
    if isinstance(start, int):
        kernel = _kernel(own, start, 1, N, window, c.attention_softcap, interpret)
    elif not fits(T, k_BSKH.shape[1]):
        raise ValueError(f"{T} of {k_BSKH.shape[1]} queries are not a part in whole blocks")
    else:
        kernel = _kernel_of_part(own, start, N, window, c.attention_softcap, interpret)
    q_BNTH = jnp.swapaxes(_fill(plain.scaled(c, q_BTNH), own.queries, 0), 1, 2)
    k_BKSH, v_BKSH = (jnp.swapaxes(_fill(x, own.keys, 0), 1, 2) for x in (k_BSKH, v_BSKH))
    filled = _fill(segments_BT, own.queries, -1), _fill(segments_BS, own.keys, -1)
    segments = splash_attention.SegmentIds(*filled)
    forward, dkv, dq = flops(own, B, N, H, window, start)
    # Read from the compiled program, in which a kernel is opaque: what it executes.
    with jax.named_scope(f"jft_kernel_flops_{forward}_dkv_{dkv}_dq_{dq}"):
        out_BNTH = jax.vmap(kernel, (0, 0, 0, 0, None))(q_BNTH, k_BKSH, v_BKSH, segments, sinks_N)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :T]


def flops(
    own: Sizes, B: int, N: int, H: int, window: int | None, start: jax.Array | int | None = 0
) -> tuple[int, int, int]:
    """Executed by one call of the forward, the dkv and the dq kernel; the last is 0 where fused.

    With a traced start those of the part that has most to do: the others wait for it.
    """
    starts = [start] if isinstance(start, int) else range(0, own.keys, own.queries)

    def executed(products: int, block_k: int) -> int:
        if not products:
            return 0
        counts = [
            len(blocks.pairs(own.queries, own.keys, own.block_q, block_k, first, window))
            for first in starts
        ]
        return 2 * products * B * N * H * own.block_q * block_k * max(counts)

    return (
        executed(2, own.block_k),
        executed(5 if own.fused else 4, own.block_k_backward),
        executed(0 if own.fused else 3, own.block_k),
    )


def _kernel_of_part(own: Sizes, start: jax.Array, N: int, *rest: Any) -> Any:
    """The kernel of a whole row with one part's rows of its tables, as `manual_sharding_spec` would cut them."""
    parts = own.keys // own.queries
    whole = _kernel(dataclasses.replace(own, queries=own.keys), 0, parts, N, *rest)

    def part(table: np.ndarray) -> jax.Array:
        axis = 0 if table.ndim == 1 else 1  # of the queries' indices; of tables over blocks
        size = table.shape[axis] // parts
        return lax.dynamic_slice_in_dim(jnp.asarray(table), start // own.queries * size, size, axis)

    return jax.tree.map(part, whole)


# Kept, for the tables of long rows take seconds and a layer is traced several times.
@functools.lru_cache(maxsize=64)
def _kernel(
    own: Sizes,
    start: int,
    parts: int,
    N: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = (own.queries, own.keys)
    if window is None:
        mask = splash_attention.CausalMask(shape, start)
    else:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), start)
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * N),
            block_sizes=splash_attention.BlockSizes(
                block_q=own.block_q,
                block_kv=own.block_k,
                block_q_dkv=own.block_q,
                block_kv_dkv=own.block_k_backward,
                block_kv_dkv_compute=own.block_k,
                block_q_dq=None if own.fused else own.block_q,
                block_kv_dq=None if own.fused else own.block_k,
                use_fused_bwd_kernel=own.fused,
            ),
            attn_logits_soft_cap=softcap,
            head_shards=1,
            q_seq_shards=parts,
            residual_checkpoint_name="attended",  # of the output and of the log-sum-exp
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)  # no array of a device outlives the trace


def _filled(length: int) -> tuple[int, int]:
    """A length in whole blocks, and the block: the longest of at most BLOCK that adds no more than an eighth."""
    least = -(-length // LANES) * LANES
    for block in range(min(BLOCK, least), LANES, -LANES):
        filled = -(-least // block) * block
        if filled * 8 <= least * 9:
            return filled, block
    return least, LANES


def _fill(x: jax.Array, length: int, value: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths, constant_values=value)
