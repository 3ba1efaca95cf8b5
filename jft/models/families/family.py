# SPDX-License-Identifier: Apache-2.0
"""What a family is: its names in files, and how its config.json and our `Config` become each other."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jft.models import architecture, names
from jft.models.families import settings


@dataclasses.dataclass(frozen=True)
class Family:
    """One file per family makes one or more of these.

    Attributes:
      model_type: of config.json; the family's name here.
      architecture: transformers' class.
      read: a config.json to our configuration; refuses what is not implemented.
      write: the inverse, without architectures and model_type.
      weights: the table of tensor names; rows that a configuration has no parameter for do no harm.
      presets: configurations of published models by short name.
    """

    model_type: str
    architecture: str
    read: Callable[[settings.Settings], architecture.Config]
    write: Callable[[architecture.Config], dict[str, Any]]
    weights: tuple[names.Weight, ...]
    presets: Mapping[str, architecture.Config] = dataclasses.field(default_factory=dict)
