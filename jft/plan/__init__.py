# SPDX-License-Identifier: Apache-2.0
"""What a model and its training step need: counts of parameters, and what a compiled program takes on a topology."""

from jft.plan.counts import plan, read_config, render

__all__ = ["plan", "read_config", "render"]
