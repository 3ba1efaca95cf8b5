# SPDX-License-Identifier: Apache-2.0
"""What is known of the examples of a run before it: the check's findings, and what may not be parted by the split.

It is kept in the cache beside the rows, since it needs a look at every text.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import tqdm

from jft import errors
from jft.data import checks, examples, findings, split, store
from jft.data import tokenised as cache

VERSION = 1  # of what is kept; another one when the checks change


class Examined:
    """What is kept of one look at the examples; arrays are read only where they are needed."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        with np.load(path) as kept:
            told = json.loads(str(kept["findings"]))
        self.findings = [
            findings.Finding(**each | {"places": tuple(map(tuple, each["places"]))})
            for each in told
        ]

    def check(self, allow: str = "") -> None:
        """Raises UserError if the check found an error of a kind that `allow` (kinds, by comma) does not name."""
        allowed = {kind.strip() for kind in allow.split(",") if kind.strip()}
        unknown = sorted(allowed - set(findings.KINDS))
        if unknown:
            raise errors.UserError(
                f"data.allow={allow}: {unknown[0]!r} is no kind of finding; known are {', '.join(findings.KINDS)}"
            )
        wrong = [f for f in self.findings if f.severity == "error" and f.kind not in allowed]
        if wrong:
            more = f" ({len(wrong) - 1} more errors: `jft check`)" if len(wrong) > 1 else ""
            first = wrong[0]
            raise errors.UserError(
                f"data: {first.kind}: {first.message}; {first.advice}, or set data.allow={first.kind}{more}"
            )

    def held_out(self, fraction: float, seed: int) -> np.ndarray:
        """Which training examples are for validation, a bool each: see `split.held_out`. It is kept as well."""
        kept = self._path.with_name(f"{self._path.stem}-{cache.hash_of([fraction, seed])}.npy")
        if kept.is_file():
            os.utime(kept)
            return np.load(kept)
        with np.load(self._path) as arrays:
            keys = [key.tobytes() for key in arrays["keys"]]
            held = split.held_out(keys, arrays["groups"], fraction, seed)
        _write(kept, lambda file: np.save(file, held))
        return held


def examine(
    trains: Sequence[store.Stored], valids: Sequence[store.Stored], *, near: bool
) -> Examined:
    """Looks at all examples, once; `near` asks for near duplicates, which the split needs."""
    what = {
        "version": VERSION,
        "train": [one.meta["fingerprint"] for one in trains],
        "valid": [one.meta["fingerprint"] for one in valids],
        "files": [one.files for one in (*trains, *valids)],
        "near": near,
    }
    kept = cache.cache_folder() / f"examined-{cache.hash_of(what)}.npz"
    if kept.is_file():
        os.utime(kept)
    else:
        _look(trains, valids, near, kept)
    return Examined(kept)


def _look(
    trains: Sequence[store.Stored], valids: Sequence[store.Stored], near: bool, kept: pathlib.Path
) -> None:
    examination = checks.Examination(near=near, languages=False)
    keys = bytearray()
    for example in _shown(trains):
        examination.add(example)
        keys += split.prompt_key(example, 0)
    # The groups are of training rows alone: validation rows come after them.
    groups = examination.groups()
    for example in _shown(valids):
        examination.add(example, valid=True)
    told = json.dumps([dataclasses.asdict(finding) for finding in examination.findings()])
    arrays = {
        "keys": np.frombuffer(keys, np.uint8).reshape(len(groups), -1),
        "groups": groups,
        "findings": np.array(told),
    }
    _write(kept, lambda file: np.savez(file, **arrays))


def _shown(some: Sequence[store.Stored]) -> Iterator[examples.Example]:
    """All examples, with a bar where it takes long."""
    total = sum(one.meta["examples"] for one in some)
    settings = {"unit": "row", "file": sys.stderr, "delay": 3, "mininterval": 1, "leave": False}
    with tqdm.tqdm(desc="checking", total=total, **settings) as bar:
        for one in some:
            for example in one.read_examples():
                yield example
                bar.update()


def _write(path: pathlib.Path, save: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        save(file)
    os.replace(part, path)
