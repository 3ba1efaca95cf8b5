# SPDX-License-Identifier: Apache-2.0
"""What each format of `model.quantize` costs on a real model's weights: bits, and errors; a Markdown table.

python tools/quantize_table.py [--model=smollm2-135m-instruct]
"""

import argparse

import jax
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    flags = parser.parse_args()
    from jft import models, quant, tree
    from jft.models import quantizing

    leaves = tree.flatten(models.load(flags.model).params)
    print(
        "| format | bits per weight | relative error, root mean square | largest error of a leaf | least cosine of a leaf |"
    )
    print("|---|---|---|---|---|")
    for kind in quant.KINDS:
        squares, total, bits, numbers, found = 0.0, 0.0, 0, 0, []
        for path, x in leaves.items():
            how = quantizing.way(path, x.shape, quantizing.Settings(kind))
            if how is None:
                continue
            q = jax.jit(how)(x)
            lost = quant.loss(x, q)
            length = float(np.square(np.asarray(x, np.float64)).sum())
            squares, total, bits = (
                squares + lost.relative**2 * length,
                total + length,
                bits + 8 * q.nbytes,
            )
            numbers += q.size
            found.append(lost)
        print(
            f"| {kind} | {bits / numbers:.3f} | {(squares / total) ** 0.5:.5f}"
            f" | {max(one.relative for one in found):.5f} | {min(one.cosine for one in found):.5f} |"
        )


if __name__ == "__main__":
    main()
