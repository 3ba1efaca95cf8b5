# SPDX-License-Identifier: Apache-2.0
"""Every model family: from a config.json to a `Config` and back, and the names of its tensors in files."""

import difflib
from collections.abc import Mapping
from typing import Any

from jft import errors
from jft.models import architecture, names
from jft.models.families import (
    family,
    gemma,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen,
    settings,
    smollm3,
)

FAMILIES: dict[str, family.Family] = {
    own.model_type: own
    for own in (
        llama.LLAMA,
        smollm3.SMOLLM3,
        mistral.MISTRAL,
        mistral.MIXTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi3.PHI3,
        olmo2.OLMO2,
        granite.GRANITE,
        gpt2.GPT2,
        gpt_oss.GPT_OSS,
    )
}
_EXPERTS = 1 << 16  # of all layers: each has names in files

PRESETS: dict[str, architecture.Config] = {
    name: config for own in FAMILIES.values() for name, config in own.presets.items()
}


def preset(name: str) -> architecture.Config:
    """A published model's configuration; raises UserError for a name that is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.3)
        raise errors.UserError(f"no preset {name!r}; near it: {', '.join(near) or 'nothing'}")
    return PRESETS[name]


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> architecture.Config:
    """Reads a config.json, of transformers 4 or 5.

    Args:
      config: the parsed file.
      where: the file's name, for messages.

    Raises:
      errors.UserError: another architecture, or a key is missing, malformed or asks for what the decoder lacks.
    """
    own = _family(config, where)
    read = settings.Settings(config, where)
    found = own.read(read)
    read.done()
    if found.experts and found.num_layers * found.experts.count > _EXPERTS:
        raise errors.UserError(f"{where}: more than {_EXPERTS:,} experts in all layers")
    return found


def _family(config: Mapping[str, Any], where: str) -> family.Family:
    named, model_type = config.get("architectures"), config.get("model_type")
    if named is None and model_type is None:
        raise errors.UserError(
            f"{where}: neither architectures nor model_type says what the model is"
        )
    if named is None:
        own = FAMILIES.get(str(model_type))
        if own is None:
            raise errors.UserError(
                f"{where}: model_type is {model_type!r}; implemented are {_known()}"
            )
        return own
    by_class = {own.architecture: own for own in FAMILIES.values()}
    one = isinstance(named, list) and len(named) == 1 and isinstance(named[0], str)
    if not one or named[0] not in by_class:
        known = ", ".join(by_class)
        raise errors.UserError(f"{where}: architectures is {named!r}; implemented are {known}")
    own = by_class[named[0]]
    if model_type is not None and model_type != own.model_type:
        raise errors.UserError(
            f"{where}: model_type is {model_type!r}, and architectures is {named!r}, which has {own.model_type!r}"
        )
    return own


def _known() -> str:
    return ", ".join(FAMILIES)


def to_hf(config: architecture.Config) -> dict[str, Any]:
    """The inverse of `from_hf`, in transformers 4's spelling, which version 5 reads as well."""
    own = FAMILIES[config.family]
    named = {"architectures": [own.architecture], "model_type": own.model_type}
    return named | own.write(config)


def weights(config: architecture.Config) -> tuple[names.Weight, ...]:
    """The rows of the family's table that a model with this configuration has."""
    return names.rows(config, FAMILIES[config.family].weights)


def tensors(config: architecture.Config) -> dict[str, tuple[names.Weight, names.Index]]:
    """Every tensor of a Hugging Face checkpoint by its name: its row and its index into the leaf."""
    return names.tensors(config, FAMILIES[config.family].weights)


def modules(config: architecture.Config) -> dict[str, tuple[str, int | None]]:
    """Every torch module that an adapter can name; see `names.modules`."""
    return names.modules(config, FAMILIES[config.family].weights)
