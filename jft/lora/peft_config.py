# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: what it says about the modules of a base, and what it would say about our adapters.

Every key is honoured, harmless, or refused by name unless it is empty or at its one value that we implement. PEFT
drops keys that it does not know; here a later version's key is let through only while it says nothing.
"""

import collections
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jft import errors, json_text
from jft.lora import peft_expressions, peft_matching, spec

# What follows covers the 41 keys that PEFT 0.21 writes, and those of other versions; a test counts them.
HONOURED = frozenset(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_dropout target_modules"
    " exclude_modules layers_to_transform layers_pattern".split()
)
# They may hold anything.
HARMLESS = frozenset(
    {
        # Where the base came from. Its names and shapes are compared; `jft.json` knows its fingerprint.
        "base_model_name_or_path",
        "revision",
        # Who wrote the file, and by which class PEFT would load the base.
        "peft_version",
        "auto_mapping",
        # Whether PEFT freezes the adapter when it loads it.
        "inference_mode",
        # Settings of an initialisation that is over. `init_lora_weights` says whether it changed the base; PEFT leaves
        # these where it has converted such an adapter to a plain one.
        "eva_config",
        "corda_config",
        "lora_ga_config",
        # Mean something only beside `megatron_config` and `use_qalora`, which are refused.
        "megatron_core",
        "qalora_group_size",
        # PEFT ignores it in files.
        "runtime_config",
        # How the base's kernel lies in torch (GPT-2's is [in, out]); the factors lie alike, and PEFT corrects it itself.
        "fan_in_fan_out",
    }
)
# Something other than a plain adapter of this base, unless one of these values, or empty.
ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),  # others train the base's biases
    "task_type": ("CAUSAL_LM",),  # others have another head
    # True, False, "gaussian", "eva", "orthogonal" and "mica" leave the base as it was. PiSSA, OLoRA, CorDA, LoRA-GA and
    # LoftQ change it, so that their factors fit another base than this one.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "ensure_weight_tying": (),
    "kasa_config": (),
    "layer_replication": (),
    "loftq_config": (),
    "lora_bias": (),
    "megatron_config": (),
    "modules_to_save": (),
    "monteclora_config": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (),
    "use_qalora": (),
    "velora_config": (),
}
_REMEDIES = {
    "init_lora_weights": "it changes the base, whose factors then fit no other; PEFT's save_pretrained with"
    " path_initial_model_for_weight_conversion writes a plain adapter",
    "modules_to_save": "whole weights beside an adapter are not read",
}
_LARGEST_RANK = 1 << 31
_LARGEST = 1e38  # of float32, in which scales are multiplied


def read(path: pathlib.Path) -> peft_matching.Config:
    """Reads a configuration.

    Raises:
      UserError: it is damaged, or asks for what is not implemented.
    """
    config = peft_matching.Config(path, _parse(path))
    if config.values.get("peft_type") != "LORA":
        raise config.refusal("peft_type", "only LORA is read")
    for check in (_check_keys, _check_numbers, _check_rules, _check_layers):
        check(config)
    return config


def _parse(path: pathlib.Path) -> dict[str, Any]:
    values = json_text.read(path, unique=True)
    if not isinstance(values, dict):
        raise errors.UserError(f"{path} is no JSON object")
    return values


def _check_keys(config: peft_matching.Config) -> None:
    for key, value in config.values.items():
        if key in HONOURED or key in HARMLESS or not value:
            continue
        if key not in ONLY:
            why = "this key is not known here; delete it if it does not change the adapter"
            raise config.refusal(key, why)
        if not any(type(value) is type(allowed) and value == allowed for allowed in ONLY[key]):
            raise config.refusal(key, _REMEDIES.get(key, "it is not implemented"))
    for key in ("use_rslora", "use_dora"):
        if config.values.get(key) not in (None, True, False):
            raise config.refusal(key, "it is true or false")


def _check_numbers(config: peft_matching.Config) -> None:
    for key, patterns, good, need in (
        ("r", "rank_pattern", _is_rank, "a rank is a whole number, 1 or more"),
        ("lora_alpha", "alpha_pattern", _is_number, "an alpha is a finite number"),
    ):
        if config.values.get(key) is None:
            raise config.refusal(key, f"{key} is missing; PEFT would silently take 8")
        if not good(config.values[key]):
            raise config.refusal(key, need)
        values = config.values.get(patterns) or {}
        if not isinstance(values, dict):
            raise config.refusal(patterns, "it maps names to values")
        if bad := [k for k, value in values.items() if not good(value)]:
            raise config.refusal(patterns, f"{need}, unlike that of {bad[0]!r}")
    dropout = config.values.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        raise config.refusal("lora_dropout", "a rate is 0 or more, below 1")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK  # type(), because True is an int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # False for NaN


def _check_rules(config: peft_matching.Config) -> None:
    if not config.values.get("target_modules"):
        raise config.refusal("target_modules", "target_modules is missing")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        rule = config.values.get(key) or []
        if not isinstance(rule, str | list) or not all(isinstance(x, str) for x in rule):
            raise config.refusal(key, "it is neither a list of names nor a regular expression")
        if isinstance(rule, str):
            _check_expression(config, key, rule)
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        patterns = config.values.get(key) or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            _check_expression(config, key, pattern)


def _check_expression(config: peft_matching.Config, key: str, expression: str) -> None:
    # As it stands, and as part of the expressions that `peft_matching` makes of it.
    for whole in (expression, peft_matching.ending(expression), peft_matching.layered(expression)):
        try:
            peft_expressions.compiled(whole)
        except ValueError as error:
            why = f"{expression!r:.200} is not a regular expression: {error}"
            raise config.refusal(key, why) from error


def _check_layers(config: peft_matching.Config) -> None:
    layers = config.values.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int and layer >= 0 for layer in numbers):
        raise config.refusal("layers_to_transform", "it holds numbers of layers, 0 or more")
    if numbers and isinstance(config.values["target_modules"], str):
        why = "PEFT takes it only beside a list of target_modules"
        raise config.refusal("layers_to_transform", why)


def describe(adapters: Mapping[str, spec.Factors], modules: Iterable[str]) -> dict[str, Any]:
    """The configuration of these adapters; patterns only as whole names, which no sorting can make ambiguous.

    Args:
      adapters: {module: the factors that hold it}, all with one dropout, all DoRA or none.
      modules: the base's, to see where last parts of names will do.
    """
    sizes = {m: (f.rank, _alpha(float(f.scale), f.rank)) for m, f in adapters.items()}
    [((rank, alpha), _)] = collections.Counter(sizes.values()).most_common(1)
    short = sorted({m.rsplit(".", 1)[-1] for m in adapters})
    covered = {m for m in modules if m.rsplit(".", 1)[-1] in short}
    any_factors = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": short if covered == set(adapters) else sorted(adapters),
        "rank_pattern": {m: r for m, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {m: a for m, (_, a) in sizes.items() if a != alpha},
        "use_rslora": False,  # alpha says the scale exactly, whichever rule it came from
        "use_dora": any_factors.magnitude is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": float(any_factors.dropout),
        "modules_to_save": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _alpha(scale: float, rank: int) -> float | int:
    """The alpha whose quotient by the rank is the scale to the last bit, where there is one.

    scale * rank may be off by one bit, and then a file that is read and written again would change. Where no alpha
    gives the scale (one of sqrt(rank), say) the nearest does, and what it gives leads back to it.
    """
    near = scale * rank
    candidates = (
        round(near),
        near,
        math.nextafter(near, -math.inf),
        math.nextafter(near, math.inf),
    )
    alpha = next((x for x in candidates if x / rank == scale), near)
    return int(alpha) if float(alpha).is_integer() else alpha
