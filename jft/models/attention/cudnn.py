# SPDX-License-Identifier: Apache-2.0
"""Attention on NVIDIA GPUs: cuDNN's flash attention, through `jax.nn.dot_product_attention`.

It has no soft cap and no sinks, wants 16-bit numbers and heads of at most 128 (256 from Hopper on), and knows no
segments: packed rows need a bias of T x S, one for all heads, with a gradient of its own. So its rows are bounded. It takes
no window beside a bias either: the window is in the bias.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jft.models import architecture
from jft.models.attention import blocks, plain

LONGEST = 8192  # of a row: its bias and the bias's gradient are then 256 MiB
BLOCK = 128  # by which it skips what lies above the diagonal


def supports(c: architecture.Config, T: int, dtype: Any) -> bool:
    """Whether whole rows of T can be attended so, on any card since Ampere."""
    if c.attention_softcap or c.sinks or T > LONGEST:
        return False
    sixteen = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return sixteen and c.head_dim <= 128 and c.head_dim % 8 == 0


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
) -> jax.Array:
    """As `attention.attend`."""
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    q_BTNH, segments_BT = even(q_BTNH, 0), even(segments_BT, -1)
    k_BSKH, v_BSKH, segments_BS = even(k_BSKH, 0), even(v_BSKH, 0), even(segments_BS, -1)
    options = arguments(c, segments_BT, segments_BS, window=window, start=start)
    forward, backward = flops(B, T, S, N, H, start)
    with jax.named_scope(f"jft_kernel_flops_{forward}_backward_{backward}"):
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, implementation="cudnn", **options
        )
    return out_BTNH[:, :T]


def arguments(
    c: architecture.Config,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    window: int | None,
    start: jax.Array | int,
) -> dict[str, Any]:
    """Those of `jax.nn.dot_product_attention` beside the heads. Causal by name lets it skip half of the blocks."""
    positions_T = start + jnp.arange(segments_BT.shape[1])
    positions_S = jnp.arange(segments_BS.shape[1])
    mask_BTS = plain.visible(segments_BT, segments_BS, positions_T, positions_S, window)
    causal = _causal(segments_BT.shape[1], segments_BS.shape[1], start)
    return {"mask": mask_BTS[:, None], "scale": plain.scale(c), "is_causal": causal}


def flops(
    B: int, T: int, S: int, N: int, H: int, start: jax.Array | int | None = 0
) -> tuple[int, int]:
    """Executed forward and backward: 2 and 5 products over the blocks up to the diagonal; a bias skips none."""
    if _causal(T, S, start):
        area = len(blocks.pairs(T, S, BLOCK, BLOCK, 0, None)) * BLOCK * BLOCK
    else:
        area = T * S
    return 4 * B * N * H * area, 10 * B * N * H * area


def even(x: jax.Array, value: int) -> jax.Array:
    """[B, T, ...] filled to an even T, without which there is no gradient beside a bias."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, x.shape[1] % 2)
    return jnp.pad(x, widths, constant_values=value)


def _causal(T: int, S: int, start: jax.Array | int | None) -> bool:
    return T == S and isinstance(start, int) and start == 0
