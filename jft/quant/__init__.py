# SPDX-License-Identifier: Apache-2.0
"""Quantised arrays as pytree leaves. Imports jax and numpy only."""

from jft.quant.qarray import QArray as QArray
from jft.quant.quantizing import BLOCK as BLOCK
from jft.quant.quantizing import KINDS as KINDS
from jft.quant.quantizing import Loss as Loss
from jft.quant.quantizing import doubled as doubled
from jft.quant.quantizing import from_codes as from_codes
from jft.quant.quantizing import loss as loss
from jft.quant.quantizing import pairs as pairs
from jft.quant.quantizing import quantize as quantize
