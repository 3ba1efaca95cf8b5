# SPDX-License-Identifier: Apache-2.0
"""Flags: the parser of every verb, and configurations from --config=FILE[:ARG] --config.key=value."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """Faults are `UserError`; flags are not abbreviated."""

    def __init__(self, verb: str, help_text: str):
        super().__init__(
            prog=f"jft {verb}",
            description=help_text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        raise errors.UserError(f"{message} (jft {self.prog.split()[-1]} --help explains)")


def size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number; a type of argparse's."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def add_quantize(parser: Parser, what: str) -> None:
    """What `quantizing.Settings` has."""
    parser.add_argument("--quantize", help=f"{what}; nf4, int4, int8 or none")
    parser.add_argument("--quantize_embeddings", help="its embedding and head likewise: int8, none")


def show(found: Mapping[str, Any], rendered: str, as_json: bool) -> None:
    """A verb's result on standard output: one JSON object, or text."""
    print(json.dumps(found, ensure_ascii=False) if as_json else rendered)


def read_config(arguments: Sequence[str]) -> tuple[Any, dict[str, str], list[str]]:
    """The configuration that --config=FILE[:ARG] and --config.key=value say, its origins, and the other arguments."""
    from jft import config

    spec, changes, rest = None, [], []
    words = iter(arguments)
    for word in words:
        name, _, text = word.partition("=")
        if name == "--config" or name.startswith("--config."):
            if "=" not in word:
                text = next(words, None)
                if text is None:
                    raise errors.UserError(f"{name} needs a value: {name}=...")
            if name == "--config":
                spec = text
            else:
                changes.append((name.removeprefix("--config."), text))
        else:
            rest.append(word)
    if spec is None:
        raise errors.UserError("--config=FILE is missing, for instance --config=configs/sft.py")
    loaded = config.load(spec)
    config.check_complete(loaded, spec)
    origins = {
        key: spec if key in config.difference(loaded, config.base()) else "base()"
        for key in config.flatten(loaded)
    }
    for key, text in changes:
        config.override(loaded, key, text)
        origins[key] = "flag"
    return loaded, origins, rest
