# SPDX-License-Identifier: Apache-2.0
"""Holding out examples for validation, by content.

Examples with the same prompt stay together, so that no validation prompt was seen in training. The
choice depends on the prompts and the seed alone: shuffling the file does not change it.
"""

import collections
import hashlib
import json
from collections.abc import Sequence

from jft import errors
from jft.data import formats


def split(
    examples: Sequence[formats.Example], fraction: float, seed: int
) -> tuple[list[formats.Example], list[formats.Example]]:
    """Divides examples into (train, valid), each in the order given.

    Args:
        fraction: of the examples that go to `valid`, at most and as nearly as whole prompts allow;
            at least one example where there are two or more and the fraction is not 0.

    Raises:
        errors.UserError: the fraction is not in [0, 1), or all examples share one prompt.
    """
    if not 0 <= fraction < 1:
        raise errors.UserError(
            f"the validation fraction is {fraction}; it must be at least 0 and below 1"
        )
    if fraction == 0 or len(examples) < 2:
        return list(examples), []
    keys = [_prompt_key(example, seed) for example in examples]
    sizes = collections.Counter(keys)
    if len(sizes) == 1:
        raise errors.UserError(
            f"all {len(examples)} rows have the same prompt, so none can be held out; "
            "give a validation file with data.valid=FILE"
        )
    held = _choose(sizes, max(1, round(fraction * len(examples))))
    train = [example for key, example in zip(keys, examples, strict=True) if key not in held]
    valid = [example for key, example in zip(keys, examples, strict=True) if key in held]
    return train, valid


def _prompt_key(example: formats.Example, seed: int) -> str:
    """A hash of all but the last turn; case and spacing do not tell two prompts apart."""
    turns = [
        [turn["role"], " ".join(turn["content"].split()).casefold()]
        for turn in example.messages[:-1]
    ]
    return hashlib.sha256(json.dumps([seed, turns]).encode()).hexdigest()


def _choose(sizes: collections.Counter[str], target: int) -> set[str]:
    held: set[str] = set()
    count = 0
    for key in sorted(sizes):  # the hashes' order is the random order
        if count + sizes[key] <= target and len(held) < len(sizes) - 1:
            held.add(key)
            count += sizes[key]
    return held or {min(sorted(sizes), key=sizes.__getitem__)}
