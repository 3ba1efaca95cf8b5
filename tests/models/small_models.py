# SPDX-License-Identifier: Apache-2.0
"""Small models of every family, for the tests of this folder."""

import dataclasses

from jft.models import architecture, families

ONE_EACH = [next(iter(own.presets)) for own in families.FAMILIES.values()]


def small(preset: str) -> architecture.Config:
    """A preset of a few layers and small sizes, its switches kept."""
    config = families.PRESETS[preset]
    return dataclasses.replace(
        config,
        vocab_size=40,
        d_model=24,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2 if config.num_kv_heads < config.num_heads else 6,
        head_dim=4,
        d_ff=10,
        max_length=32,
        experts=config.experts and dataclasses.replace(config.experts, count=4, top_k=2),
    )


def in_blocks(preset: str) -> architecture.Config:
    """The same with kernels that have whole blocks of 64."""
    own = small(preset)
    few = own.num_kv_heads < own.num_heads
    heads = {"num_heads": 4, "num_kv_heads": 2 if few else 4, "head_dim": 16}
    return dataclasses.replace(own, d_model=64, d_ff=128, num_layers=2, **heads)
