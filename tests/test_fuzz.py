# SPDX-License-Identifier: Apache-2.0
"""The fuzzers of tools/fuzz.py, shortly: the cases that once failed, and a few new ones that are the same in every run."""

import pathlib
import random
from typing import Any

import fuzz
import pytest

KEPT = pathlib.Path(__file__).parent / "fuzz"
# As many as take a second; data has its own test, in tests/data/test_fuzz.py.
SHORT = {"safetensors": 300, "gguf": 40, "folder": 30, "adapter": 60, "template": 15}
CASES = sorted(KEPT.glob("*/*.json"))


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    return {name: fuzz.target(name) for name in SHORT}


@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}-{path.stem}" for path in CASES])
def test_what_once_failed_is_told_in_one_line(
    targets: dict[str, Any], tmp_path: pathlib.Path, path: pathlib.Path
) -> None:
    own = targets[path.parent.name]
    assert fuzz.check(own, fuzz.kept(own, path), tmp_path / "case") in ("refused", "limited")


@pytest.mark.parametrize("name", SHORT)
def test_new_cases(targets: dict[str, Any], tmp_path: pathlib.Path, name: str) -> None:
    own = targets[name]
    found = {
        fuzz.check(own, own.make(random.Random(seed)), tmp_path / "case")
        for seed in range(SHORT[name])
    }
    assert {"read", "refused"} <= found, "the fuzzer does not reach both ends"


def test_a_kept_case_is_the_case(tmp_path: pathlib.Path) -> None:
    own = fuzz.target("safetensors")
    files = own.make(random.Random(3))
    fuzz.keep(own, tmp_path / "x.json", files, "why")
    assert fuzz.kept(own, tmp_path / "x.json") == files
