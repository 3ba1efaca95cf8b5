# SPDX-License-Identifier: Apache-2.0
"""What an adapter_config.json says about the modules of a base: which are adapted, with which rank and scale.

The rules are PEFT's, but for what it passes over in silence: a pattern that matches nothing, patterns that contradict
each other, a layer that is not there.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jft import errors
from jft.lora import peft_expressions


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration that `jft.lora.peft_config.read` has read and checked as far as that goes without the base.

    Attributes:
      where: the file, for messages.
      values: its keys.
    """

    where: pathlib.Path
    values: Mapping[str, Any]

    @property
    def use_dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    @property
    def dropout(self) -> float:
        return float(self.values.get("lora_dropout") or 0)

    def targets(self, modules: Iterable[str]) -> list[str]:
        """Those of the base's modules that are adapted.

        Raises:
          UserError: none is, or a pattern or layer number names nothing in this base.
        """
        modules = list(modules)
        self._modules.extend(modules)
        self._check_patterns(modules)
        self._check_layers(modules)
        named = [module for module in modules if self._is_named(module)]
        if not named:
            raise self.refusal("target_modules", "it names no module of this base")
        exclude = self.values.get("exclude_modules")
        kept = [module for module in named if not (exclude and self._matches(exclude, module))]
        if not kept:
            raise self.refusal("exclude_modules", "it excludes every target")
        return kept

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Entries of target_modules that name none of the modules: PEFT lets them pass, and a typo is one."""
        rule, modules = self.values["target_modules"], list(modules)
        entries = [] if isinstance(rule, str) else rule
        return [x for x in entries if not any(_is_named([x], module) for module in modules)]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        rank = self._value("rank_pattern", module, self.values["r"])
        alpha = self._value("alpha_pattern", module, self.values["lora_alpha"])
        return rank, alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def refusal(self, key: str, why: str) -> errors.UserError:
        return errors.UserError(f"{self.where}: {plain(key)}={short(self.values.get(key))}: {why}")

    def _is_named(self, module: str) -> bool:
        rule = self.values["target_modules"]
        if isinstance(rule, str) and rule.lower() == "all-linear":
            return not module.endswith(("lm_head", "embed_tokens"))
        if not self._matches(rule, module):
            return False
        # In PEFT a module's whole name wins over the choice of layers.
        return not self._layers or module in rule or self._layer_of(module) in self._layers

    @functools.cached_property
    def _modules(self) -> list[str]:
        """The base's; an expression is tried on all at once."""
        return []

    def _hits(self, expression: str, how: str) -> Mapping[str, str | None]:
        return peft_expressions.hits(expression, tuple(self._modules), how, str(self.where))

    def _matches(self, rule: str | Sequence[str], module: str) -> bool:
        """A list holds names or their last parts, a string is a regular expression."""
        if isinstance(rule, str):
            return module in self._hits(rule, "fullmatch")
        return _is_named(rule, module)

    @functools.cached_property
    def _layers(self) -> list[int]:
        """The layers to adapt; none named means all."""
        layers = self.values.get("layers_to_transform")
        return [] if layers is None else [layers] if isinstance(layers, int) else layers

    def _layer_of(self, module: str) -> int | None:
        """The number that follows layers_pattern, or else the first one in the name."""
        patterns = self.values.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        rules = [layered(pattern) for pattern in patterns]
        for rule in rules or [r".*?\.[^.]*\.(?P<layer>\d+)\."]:
            if found := self._hits(rule, "match").get(module):
                return int(found)
        return None

    def _check_layers(self, modules: Sequence[str]) -> None:
        there = {self._layer_of(module) for module in modules} if self._layers else set()
        if absent := [layer for layer in self._layers if layer not in there]:
            raise self.refusal("layers_to_transform", f"this base has no layer {absent[0]}")

    def _patterns(self, key: str) -> Mapping[str, Any]:
        return self.values.get(key) or {}

    def _check_patterns(self, modules: Sequence[str]) -> None:
        """Nothing in the tensors tells an alpha: where its pattern matches nothing, a scale would be lost unseen."""
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in self._patterns(key):
                if not self._hits(ending(pattern), "match"):
                    raise errors.UserError(
                        f"{self.where}: {key}: {pattern!r} matches no module of this base; mend it, or delete the"
                        " entry, which PEFT ignores"
                    )

    def _value(self, key: str, module: str, default: Any) -> Any:
        """The value of the patterns that match; PEFT takes the first, but sorts them when it saves."""
        patterns = self._patterns(key).items()
        hits = {p: v for p, v in patterns if module in self._hits(ending(p), "match")}
        if len(set(hits.values())) > 1:
            raise errors.UserError(
                f"{self.where}: several entries of {key} match {module} with different values"
                f" {short(hits)}: which one holds depends on an order that the file has lost"
            )
        return next(iter(hits.values()), default)


def ending(pattern: str) -> str:
    """PEFT's expression for a module whose last parts match a pattern."""
    return rf"(.*\.)?({pattern})$"


def layered(pattern: str) -> str:
    """PEFT's expression for the number of a layer that follows a pattern."""
    return rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\."


def _is_named(names: Sequence[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def short(value: Any) -> str:
    """A value of the file, for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."


def plain(name: str) -> str:
    """A name of the file, for a message, which is one line and no control code for a terminal."""
    return name if name.isprintable() else repr(name)
