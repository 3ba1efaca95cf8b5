# SPDX-License-Identifier: Apache-2.0
"""Whatever a file holds: no error but ours, each in one line with its place, and no row lost or told of twice.

The cases are those of the target data of tools/fuzz.py, which looks for more.
"""

import importlib.util
import pathlib
import random
import sys
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from jft.data import examples, formats

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "fuzz_data.py"


@pytest.fixture(scope="module")
def fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SETTINGS = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # new cases are the tool's work, not that of the tests
    suppress_health_check=list(hypothesis.HealthCheck),
)


@SETTINGS
@hypothesis.given(source=st.randoms(use_true_random=False))
def test_mutated_files(
    fuzz: Any, tmp_path_factory: pytest.TempPathFactory, source: random.Random
) -> None:
    fuzz.check(fuzz.make(source), tmp_path_factory.getbasetemp())


def test_the_fuzzer_reaches_everything(fuzz: Any, tmp_path: pathlib.Path) -> None:
    """Its cases are not all refused at the door: each format gives examples and faults of rows."""
    found: dict[str, set[str]] = {}
    for seed in range(1500):
        case = fuzz.make(random.Random(seed))
        found.setdefault(case.kind, set()).update(fuzz.check(case, tmp_path))
    everything = {"Example", "Fault", "refused"}
    assert found == dict.fromkeys(fuzz.WRITERS, everything)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "response", "system", "label", "x"]), VALUES)
    | st.fixed_dictionaries({"prompt": TEXT, "response": TEXT})
    | st.fixed_dictionaries({"messages": VALUES})
    | VALUES,
    min_size=1,
    max_size=8,
)


@SETTINGS
@hypothesis.given(rows=ROWS, kind=st.sampled_from(["jsonl", "ndjson", "json"]))
def test_rows_in_are_examples_and_faults(
    fuzz: Any, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str
) -> None:
    rows = [{"prompt": "p", "response": "r"}, *rows]  # so that the shape is known
    path = tmp_path_factory.getbasetemp() / f"rows.{kind}"
    path.write_bytes(fuzz.WRITERS[kind](rows))
    found = list(formats.Table(str(path)))
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    for row, value in zip(found, rows, strict=True):
        texts = isinstance(value, dict) and [value.get("prompt"), value.get("response")]
        if isinstance(row, examples.Example):
            assert isinstance(value, dict)
            assert [turn["content"] for turn in row.messages[-2:]] == texts
        elif isinstance(value, dict) and value.keys() == {"prompt", "response"}:
            assert not all(isinstance(t, str) and t.strip() and "\0" not in t for t in texts or ())
