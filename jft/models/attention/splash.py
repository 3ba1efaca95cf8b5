# SPDX-License-Identifier: Apache-2.0
"""Attention on TPU: JAX's splash attention, a Pallas kernel that skips the blocks which the mask leaves empty.

Keys and values stay as few as they are (GQA), the mask is computed in the kernel, and the weights never leave the
chip's vector memory. The kernel takes lengths in whole blocks: rows are filled up to them here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jft.models import architecture
from jft.models.attention import plain

LANES = 128  # of a TPU's vectors: lengths are multiples
BLOCK = 512  # queries and keys of a block at most: MaxText's default, which fits the vector memory of every TPU since v4
FUSED_LENGTH = 8192  # longest row of keys whose backward pass is one kernel


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of filled rows, and of blocks.

    One backward kernel needs 5 products of blocks, two need 7; but the one writes its part of the queries' gradient for
    each block of keys, so keys are cut in at most four there, and longer rows take two.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    block_k_backward: int
    fused: bool


def sizes(queries: int, keys: int) -> Sizes:
    """Those for rows of so many queries and keys."""
    (queries, block_q), (keys, block_k) = _filled(queries), _filled(keys)
    fused = keys <= FUSED_LENGTH
    parts = keys // block_k
    quarter = next(n for n in range(-(-parts // 4), parts + 1) if parts % n == 0)
    return Sizes(queries, keys, block_q, block_k, block_k * quarter if fused else block_k, fused)


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
    """As `attention.attend`; `start` where it is traced must be a multiple of T, and S one too."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    own = sizes(T, S)
    kernel = _kernel_at(start, own, T, S, N, window, c.attention_softcap, interpret)
    q_BNTH = jnp.swapaxes(_fill(plain.scaled(c, q_BTNH), own.queries, 0), 1, 2)
    k_BKSH, v_BKSH = (jnp.swapaxes(_fill(x, own.keys, 0), 1, 2) for x in (k_BSKH, v_BSKH))
    segments = splash_attention.SegmentIds(
        _fill(segments_BT, own.queries, -1), _fill(segments_BS, own.keys, -1)
    )
    with jax.named_scope(statement(own, B, N, H, window, start)):
        out_BNTH = jax.vmap(kernel, (0, 0, 0, 0, None))(q_BNTH, k_BKSH, v_BKSH, segments, sinks_N)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :T]


def flops(
    own: Sizes, B: int, N: int, H: int, window: int | None, start: jax.Array | int
) -> dict[str, int]:
    """Executed by one call of each kernel, "fwd", "dkv" and, where it is apart, "dq".

    Counted from the blocks that the kernels' own tables name. With a traced start: of the part that has most to do.
    """
    kernel = _kernel(*_static(start, own), 1, window, None, False)
    products = {"fwd": 2, "dkv": 5} if own.fused else {"fwd": 2, "dkv": 4, "dq": 3}
    blocks = {
        "fwd": (own.block_q * own.block_k, kernel.fwd_mask_info),
        "dkv": (own.block_q * own.block_k_backward, kernel.dkv_mask_info),
        "dq": (own.block_q * own.block_k, kernel.dq_mask_info),
    }

    def executed(name: str) -> int:
        area, table = blocks[name]
        parts = np.split(np.asarray(table.block_mask[0]), _parts(start, own))
        return products[name] * 2 * B * N * H * area * max(np.count_nonzero(x) for x in parts)

    return {name: executed(name) for name in products}


def statement(
    own: Sizes, B: int, N: int, H: int, window: int | None, start: jax.Array | int
) -> str:
    """The name scope by which a reader of the compiled program knows the kernels' flops."""
    forward, *backward = flops(own, B, N, H, window, start).items()
    return "_".join([f"jft_kernel_flops_{forward[1]}", *(f"{k}_{n}" for k, n in backward)])


def _parts(start: jax.Array | int, own: Sizes) -> int:
    return 1 if isinstance(start, int) else own.keys // own.queries


def _static(start: jax.Array | int, own: Sizes) -> tuple[Sizes, int, int]:
    """What the kernel is made for: with a traced start all queries, whose part is taken from its tables."""
    if isinstance(start, int):
        return own, start, 1
    return dataclasses.replace(own, queries=own.keys), 0, _parts(start, own)


def _kernel_at(
    start: jax.Array | int,
    own: Sizes,
    T: int,
    S: int,
    N: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    kernel = _kernel(*_static(start, own), N, window, softcap, interpret)
    if isinstance(start, int):
        return kernel
    if T != own.queries or S != own.keys or S % T:
        raise ValueError(f"splash attention of a part of {T} of {S} queries, not whole blocks")

    def part(table: np.ndarray) -> jax.Array:
        axis = 0 if table.ndim == 1 else 1  # of the indices of queries, of tables over blocks
        size = table.shape[axis] // (S // T)
        return lax.dynamic_slice_in_dim(jnp.asarray(table), start // T * size, size, axis)

    return jax.tree.map(part, kernel)


@functools.lru_cache(
    maxsize=64
)  # the tables take seconds for long rows, and layers are traced several times
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
    apart = {} if own.fused else {"block_q_dq": own.block_q, "block_kv_dq": own.block_k}
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * N),
            block_sizes=splash_attention.BlockSizes(
                block_q=own.block_q,
                block_kv=own.block_k,
                block_q_dkv=own.block_q,
                block_kv_dkv=own.block_k_backward,
                block_kv_dkv_compute=own.block_k,
                use_fused_bwd_kernel=own.fused,
                **apart,
            ),
            attn_logits_soft_cap=softcap,
            head_shards=1,
            q_seq_shards=parts,
            residual_checkpoint_name="attended",
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)  # no device's arrays outlive the trace


def _filled(length: int) -> tuple[int, int]:
    """A length in whole blocks, and the block: the longest of at most BLOCK that adds no more than an eighth."""
    least = -(-length // LANES) * LANES
    for block in range(min(BLOCK, least), 0, -LANES):
        filled = -(-least // block) * block
        if filled * 8 <= least * 9:
            return filled, block
    raise AssertionError("a block of LANES adds nothing")


def _fill(x: jax.Array, length: int, value: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths, constant_values=value)
