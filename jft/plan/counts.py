# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, from its configuration alone: nothing is loaded, nothing is computed.

Parameters and bytes by kind, what a token goes through in a mixture of experts, and what LoRA would train.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jft import config as configuration
from jft import errors, lora, tree
from jft.models import architecture, decoder, families, gguf, hf, resolve

KINDS: tree.Rules = (
    (r".*norm/(scale|bias)", "norms"),
    (r"(embed|positions)/embedding", "embedding"),
    (r"layers/attention/.*", "attention"),
    (r"layers/mlp/.*", "mlp"),
    (r"layers/router/.*", "router"),
    (r"layers/experts/.*", "experts"),
    (r"head/.*", "head"),
)
BYTES = {"float32": 4, "bfloat16": 2}


def plan(model: str, *, revision: str | None = None, rank: int = 16) -> dict[str, Any]:
    """Counts of a model.

    Args:
      model: a preset, a config.json, a folder, a .gguf file, an embedded model or a Hub name, of which only config.json
        is fetched.
      revision: of a Hub name.
      rank: of the adapter whose parameters are counted, on the default `lora.targets`.

    Raises:
      UserError: there is no such model, or it is not implemented.
    """
    config = read_config(model, revision)
    shapes = tree.flatten(decoder.shapes(config))
    by_kind: dict[str, int] = {}
    for path, leaf in shapes.items():
        kind = tree.lookup(KINDS, path)
        if kind is None:  # a family has a parameter that this page does not know
            raise ValueError(f"{path} is of no kind")
        by_kind[kind] = by_kind.get(kind, 0) + leaf.size
    total = sum(by_kind.values())
    targets = configuration.base().lora.targets
    spec = lora.Spec(rank=rank, targets=targets, layouts=architecture.LAYOUTS)
    saved = lora.savings(spec, decoder.shapes(config))
    return {
        "model": model,
        "family": config.family,
        "config": architecture.describe(config),
        "parameters": total,
        "by_kind": by_kind,
        "bytes": {dtype: size * total for dtype, size in BYTES.items()},
        "active_parameters": total - _idle(config, by_kind),
        "lora": {
            "rank": rank,
            "targets": targets,
            "trainable": saved.trainable,
            "percent": saved.percent,
            "adapter_bytes": saved.adapter_bytes,
        },
    }


def _idle(config: architecture.Config, by_kind: Mapping[str, int]) -> int:
    """Parameters of the experts that a token does not go to."""
    if config.experts is None:
        return 0
    e = config.experts
    return by_kind["experts"] // e.count * (e.count - e.top_k)


def read_config(model: str, revision: str | None = None) -> architecture.Config:
    """A model's configuration; see `plan`."""
    place = pathlib.Path(model).expanduser()
    if model in families.PRESETS and not place.exists():
        if revision:
            raise errors.UserError(f"--model={model}: a preset has no revision {revision!r}")
        return families.preset(model)
    if place.suffix == ".json" and place.is_file():
        return families.from_hf(_parsed(place), str(place))
    try:
        place = resolve.resolve(model, revision, config_only=True)
    except errors.UserError as error:
        if "/" in model or model.startswith(".") or place.suffix in (".json", ".gguf"):
            raise
        raise errors.UserError(f"{error}; and {_no_preset(model)}") from error
    return (gguf if place.suffix == ".gguf" else hf).read_config(place)


def _no_preset(model: str) -> str:
    try:
        families.preset(model)
    except errors.UserError as error:
        return str(error)
    return ""


def _parsed(path: pathlib.Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise errors.UserError(f"{path}: a JSON object is expected")
    return parsed


def render(found: Mapping[str, Any]) -> str:
    """The table, for a person."""
    total = found["parameters"]
    names = list(BYTES)
    lines = [
        f"{found['model']}: {found['family']}",
        f"{'':<12}{'parameters':>18}{'share':>9}" + "".join(f"{name:>12}" for name in names),
    ]
    for kind, count in (*found["by_kind"].items(), ("total", total)):
        sizes = "".join(f"{_gigabytes(count * BYTES[name]):>12}" for name in names)
        lines.append(f"{kind:<12}{count:>18,}{100 * count / total:>7.1f} %{sizes}")
    if found["active_parameters"] != total:
        active = found["active_parameters"]
        lines.append(f"{'per token':<12}{active:>18,}{100 * active / total:>7.1f} %")
    if "head" not in found["by_kind"]:
        lines.append("the head is the embedding")
    own = found["lora"]
    lines.append(
        f"LoRA of rank {own['rank']} on the default targets trains {own['trainable']:,} parameters"
        f" ({own['percent']:.2f} %), {_gigabytes(own['adapter_bytes'])} in float32"
    )
    return "\n".join(lines)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
