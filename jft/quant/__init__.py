# SPDX-License-Identifier: Apache-2.0
"""Quantised arrays as pytree leaves. Imports jax and numpy only."""

from jft.quant.qarray import KINDS as KINDS
from jft.quant.qarray import QArray as QArray
from jft.quant.qarray import quantize as quantize
