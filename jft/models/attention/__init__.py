# SPDX-License-Identifier: Apache-2.0
"""Attention of every backend: one meaning, four implementations of it, and which one a run takes.

"plain" is the meaning: all scores at once. "blockwise" never forms them, in XLA alone. "splash" is TPU's kernel, "cudnn"
the one of NVIDIA GPUs. Each is equal to the plain one, outputs and gradients, up to the rounding of its dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from jft.models import architecture
from jft.models.attention import blockwise, cudnn, plain, splash

IMPLEMENTATIONS = ("plain", "blockwise", "splash", "cudnn")

# The longest row whose scores are formed at once where there is no kernel. On CPU blockwise is as fast at 128 and faster
# from 256 on (tools/bench_attention.py); up to there plain stays, which compiles a second sooner. An accelerator starts
# its products one by one, too many short ones for a short row: up to 1,024 the scores are its lesser evil, 128 MiB a row
# of 32 heads. That bound is reckoned, not measured.
LONGEST_PLAIN = {"cpu": 256, "gpu": 1024, "tpu": 1024}


def attend(
    c: architecture.Config,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    window: int | None,
    start: jax.Array | int = 0,
    sinks_N: jax.Array | None = None,
    implementation: str = "plain",
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of a row, or of a part of its queries, to the keys of its own segments: attended_BTNH.

    Query t stands at index `start` + t of the row, key s at s. It sees s where s <= start + t, start + t - s < window, and
    both are of one segment. What rows of padding give is finite and of no meaning. On one device: under `shard_map` (with
    check_vma=False, as JAX's own kernels want it) its parts of the batch, of the heads and of the queries.

    The output, and the log-sum-exp that the backward pass needs beside it, are named "attended" and "attention_lse" for
    policies of `jax.checkpoint`; splash gives both the first name; cuDNN names neither: see `saves`.

    Args:
      c: for the scale of the scores and their soft cap; the counts of heads are those of the arrays.
      q_BTNH, k_BSKH, v_BSKH: heads; N is a multiple of K.
      segments_BT, segments_BS: numbers of the examples in a packed row, each without a gap.
      window: how many tokens a token sees, itself included; None for all.
      start: index of the first query; may be traced.
      sinks_N: a logit per head whose weight goes to nothing (https://arxiv.org/abs/2309.17453).
      implementation: one of IMPLEMENTATIONS; see `choose`.
      interpret: runs splash without a TPU, slowly.
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)
    if implementation == "blockwise":
        return blockwise.attend(c, *arrays, window=window, start=start, sinks_N=sinks_N)
    if implementation == "splash":
        return splash.attend(
            c, *arrays, window=window, start=start, sinks_N=sinks_N, interpret=interpret
        )
    if implementation == "cudnn" and sinks_N is None:
        return cudnn.attend(c, *arrays, window=window, start=start)
    if implementation != "plain":
        raise ValueError(f"no attention {implementation!r} for this model")
    positions_T, positions_S = start + jnp.arange(q_BTNH.shape[1]), jnp.arange(k_BSKH.shape[1])
    mask_BTS = plain.visible(segments_BT, segments_BS, positions_T, positions_S, window)
    attended_BTNH = plain.attend(c, q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N)
    return ad_checkpoint.checkpoint_name(attended_BTNH, "attended")


def choose(backend: str, c: architecture.Config, T: int, dtype: Any, *, context: int = 1) -> str:
    """The implementation for rows of T on "cpu", "gpu" or "tpu".

    Args:
      backend: where it will run; it may be compiled elsewhere.
      c: the model.
      T: the whole row's length.
      dtype: of the activations.
      context: how many devices share a row's queries.
    """
    wide = jnp.dtype(dtype) == jnp.float64
    if backend == "tpu" and not wide:
        if context == 1 or splash.fits(T // context, T):
            return "splash"
    if backend == "gpu" and context == 1 and cudnn.supports(c, T, dtype):
        return "cudnn"
    return "plain" if T <= LONGEST_PLAIN[backend] else "blockwise"


def saves(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: what the backward pass of any implementation needs beside queries, keys and values."""
    named = jax.checkpoint_policies.save_only_these_names("attended", "attention_lse")
    # cuDNN's results have no names.
    return named(primitive, **params) or primitive.name == "dot_product_attention_fwd_wrapper"


def flops(
    implementation: str,
    B: int,
    T: int,
    S: int,
    N: int,
    H: int,
    *,
    dtype: Any = jnp.bfloat16,
    window: int | None = None,
    start: jax.Array | int | None = 0,
) -> tuple[int, int]:
    """Executed by the products of one call forward and of one backward, in whole blocks as they are computed.

    A multiply and an add are two. Blockwise skips more as it runs, where examples are packed. `start` is None for one that
    is traced: blockwise then goes over all blocks, and splash's is the part that has most to do.
    """
    if implementation == "splash":
        own = splash.sizes(T, S, H, dtype, window)
        forward, *backward = splash.flops(own, B, N, H, window, start)
        return forward, sum(backward)
    if implementation == "cudnn":
        return cudnn.flops(B, T, S, N, H, start)
    if implementation == "plain":
        return 4 * B * N * H * T * S, 8 * B * N * H * T * S
    return blockwise.flops(B, T, S, N, H, window, start)
