# SPDX-License-Identifier: Apache-2.0
"""Published models: their own config.json gives exactly the published number of parameters, from shapes alone.

published.json holds, for each model, the keys of its config.json and its count as published (a tied head once), with
the source of both.
"""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from jft.models import decoder, families, names

PUBLISHED: dict[str, Any] = json.loads(
    pathlib.Path(__file__).with_name("published.json").read_text()
)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations_have_the_published_number_of_parameters(name: str) -> None:
    entry = PUBLISHED[name]
    config = families.from_hf(entry["config"], name)
    assert names.parameter_count(config) == entry["parameters"]
    assert config.tie_embeddings == entry["shared"]
    assert families.from_hf(families.to_hf(config)) == config
    decoder.shapes.cache_clear()


def test_presets_are_published_models() -> None:
    """Every preset equals a published configuration but for its longest context."""
    known = {
        dataclasses.replace(families.from_hf(entry["config"], name), max_length=1)
        for name, entry in PUBLISHED.items()
    }
    for name, preset in families.PRESETS.items():
        assert dataclasses.replace(preset, max_length=1) in known, name
