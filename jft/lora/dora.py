# SPDX-License-Identifier: Apache-2.0
"""DoRA (https://arxiv.org/abs/2402.09353): a trained magnitude for each output, W' = m (W + s A B) / |W + s A B|.

The norm runs over a kernel's inputs. It is computed without forming W + s A B, as
|W|^2 + 2 s <W, A B> + s^2 |A B|^2 through products of rank r, and is not differentiated (section 4.3; PEFT likewise).
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from jft import tree
from jft.lora import layouts

if TYPE_CHECKING:
    from jft.lora import spec


def gain(w: jax.Array, factors: "spec.Factors") -> jax.Array:
    """magnitude / norm, [*batch, *outputs]: what multiplies each output of x (W + s A B)."""
    norm = lax.stop_gradient(norms(w, factors.a, factors.b, factors.scale, factors.layout))
    return factors.magnitude / jnp.where(norm == 0, 1, norm)  # an output of zeros stays one


def norms(w: jax.Array, a: jax.Array, b: jax.Array, scale: float, layout: str) -> jax.Array:
    """|W + scale * A B| over the inputs, [*batch, *outputs], in the factors' dtype."""
    if layout[0] != "b":
        w = tree.dense(w)
    if "b" in layout and (tree.is_quantized(w) or jnp.finfo(w.dtype).bits < 32):
        # One at a time: the products below need W in float32, and a stack of it would be a second, larger base.
        axis = layout.index("b")
        rest = layout[:axis] + layout[axis + 1 :]
        moved = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), w)
        return lax.map(lambda p: norms(p[0], p[1], p[2], scale, rest), (moved, a, b))
    letters = "abcdefghijklmnop"[: len(layout)]
    batch, inputs, outputs = ("".join(part) for part in layouts.split(layout, tuple(letters)))
    w = w.astype(a.dtype)
    own = jnp.einsum(f"{letters},{letters}->{batch}{outputs}", w, w)
    through = jnp.einsum(f"{letters},{batch}{inputs}r->{batch}r{outputs}", w, a)
    gram = jnp.einsum(f"{batch}{inputs}r,{batch}{inputs}s->{batch}rs", a, a)
    both = 2 * scale * through + scale**2 * jnp.einsum(
        f"{batch}rs,{batch}s{outputs}->{batch}r{outputs}", gram, b
    )
    cross = jnp.einsum(f"{batch}r{outputs},{batch}r{outputs}->{batch}{outputs}", both, b)
    return jnp.sqrt(jnp.maximum(own + cross, 0))
