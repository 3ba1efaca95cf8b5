# SPDX-License-Identifier: Apache-2.0
"""What each dimension of a kernel is: by rules over path names, never by a guess about shapes.

A layout has one letter for each dimension: `b` a batch of independent kernels (stacked layers, experts), `i` an input,
`o` an output. "bioo" is [layers, D, heads, H]. Rules are ordered (regex, layout) pairs; of those whose pattern matches
the whole path, the first with the leaf's number of dimensions holds, so one pattern may have several.
"""

import re

from jft import errors, tree

Rules = tuple[tuple[str, str], ...]

# Dense kernels are [in, out], attention's [D, heads, H] and [heads, H, D]; a scan over layers puts an axis in front.
FLAX: Rules = (
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?(query|key|value)/kernel", "bioo"),
    (r"(.*/)?out/kernel", "iio"),
    (r"(.*/)?out/kernel", "biio"),
    (r"(.*/)?(kernel|embedding)", "io"),
    (r"(.*/)?kernel", "bio"),
)
# eqx.nn.Linear holds [out, in], eqx.nn.Embedding [rows, size]; vmapped construction puts an axis in front.
EQUINOX: Rules = (
    (r"(.*/)?(\w*embed\w*)/weight", "io"),
    (r"(.*/)?weight", "oi"),
    (r"(.*/)?weight", "boi"),
)
# hk.Linear's w is [in, out], hk.Embed's embeddings [rows, size]; hk.layer_stack puts an axis in front.
HAIKU: Rules = (
    (r"(.*/)?(w|embeddings)", "io"),
    (r"(.*/)?w", "bio"),
)
# For leaves that no rule of the caller's names: [in, out] is what every JAX library but Equinox means.
DEFAULT: Rules = ((r".*", "io"),)


def find(rules: tree.Rules, path: str, ndim: int) -> str:
    """The layout of a leaf.

    Raises:
      UserError: no rule says, or those that match have other numbers of dimensions, or one is no layout.
    """
    matching = [layout for pattern, layout in rules if re.fullmatch(pattern, path)]
    for layout in matching:
        if set(layout) - set("bio") or not {"i", "o"} <= set(layout):
            raise errors.UserError(
                f"layout {layout!r} of {path}: letters b (batch), i (input), o (output), with an i and an o"
            )
    fitting = [x for x in matching or [layout for _, layout in DEFAULT] if len(x) == ndim]
    if fitting:
        return fitting[0]
    if matching:
        raise errors.UserError(
            f"layout {matching[0]!r} does not fit {path} of {ndim} dimensions: one letter for each"
        )
    raise errors.UserError(
        f"{path} has {ndim} dimensions and no layout: add (regex, layout) to layouts, one letter for"
        " each dimension (b batch, i input, o output), e.g. 'bio' for stacked kernels"
    )


def split(layout: str, values: tuple) -> tuple[tuple, tuple, tuple]:
    """One value for each dimension, as those of batch, inputs and outputs."""
    batch, inputs, outputs = (
        tuple(n for n, kind in zip(values, layout, strict=True) if kind == letter)
        for letter in "bio"
    )
    return batch, inputs, outputs
