# SPDX-License-Identifier: Apache-2.0
"""What is known of the examples of a run before it: the check's findings, and what may not be parted by the split.

It is kept in the cache beside the rows, since it needs a look at every text.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jft import errors
from jft.data import checks, findings, near, split, store
from jft.data import tokenised as cache

VERSION = 1  # of what is kept; another one when the checks change


@dataclasses.dataclass(frozen=True)
class Examined:
    """Of the training examples: prompts' keys, near duplicates' groups (each its own where not asked), findings."""

    keys: list[bytes]
    groups: np.ndarray
    findings: list[findings.Finding]

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


def examine(
    trains: Sequence[store.Stored], valids: Sequence[store.Stored], *, grouped: bool
) -> Examined:
    """Looks at all examples; `grouped` also finds the groups of near duplicates among the training examples."""
    what = {
        "version": VERSION,
        "train": [one.meta["fingerprint"] for one in trains],
        "valid": [one.meta["fingerprint"] for one in valids],
        "files": [one.files for one in (*trains, *valids)],
        "grouped": grouped,
    }
    kept = cache.cache_folder() / f"examined-{cache.hash_of(what)}.npz"
    if kept.is_file():
        os.utime(kept)
        return _read(kept)
    found = _look(trains, valids, grouped)
    _write(kept, found)
    return found


def _look(
    trains: Sequence[store.Stored], valids: Sequence[store.Stored], grouped: bool
) -> Examined:
    examination = checks.Examination(near=False, languages=False)
    signatures = near.Signatures()
    keys: list[bytes] = []
    for one in trains:
        for example in one.read_examples():
            examination.add(example)
            keys.append(split.prompt_key(example, 0))
            if grouped:
                signatures.add(near.text(example))
    for one in valids:
        for example in one.read_examples():
            examination.add(example, valid=True)
    groups = signatures.groups() if grouped else np.arange(len(keys))
    return Examined(keys, groups, examination.findings())


def _write(path: pathlib.Path, found: Examined) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    told = json.dumps([dataclasses.asdict(finding) for finding in found.findings])
    keys = np.frombuffer(b"".join(found.keys), np.uint8).reshape(len(found.keys), -1)
    with part.open("wb") as file:
        np.savez(file, keys=keys, groups=found.groups, findings=np.array(told))
    os.replace(part, path)


def _read(path: pathlib.Path) -> Examined:
    with np.load(path) as kept:
        keys = [key.tobytes() for key in kept["keys"]]
        told = [
            findings.Finding(**each | {"places": tuple(map(tuple, each["places"]))})
            for each in json.loads(str(kept["findings"]))
        ]
        return Examined(keys, kept["groups"], told)
