# SPDX-License-Identifier: Apache-2.0
"""Data sets by name and folders that datasets wrote; and why the readers are not those of datasets."""

import pathlib
from typing import Any

import pytest

from jft import errors
from jft.data import examples, formats, hub, readers

AWKWARD = ["007", "NA", "", " spaced ", "a\u2028b\u0085c", "two\r\nlines", "2024-01-02"]


def values(source: str) -> list[Any]:
    """The values of all rows, of which none may be a fault."""
    rows = list(readers.stream(source))
    assert all(isinstance(row, readers.Record) for row in rows)
    return [row.value for row in rows if isinstance(row, readers.Record)]


def test_folders_of_datasets(tmp_path: pathlib.Path) -> None:
    import datasets

    rows = [{"prompt": text, "response": str(i)} for i, text in enumerate(AWKWARD)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert values(str(tmp_path / "one")) == rows
    assert len(readers.files(str(tmp_path / "one"))) == 3
    saved.filter(lambda row: row["response"] != "0").save_to_disk(tmp_path / "filtered")
    assert values(str(tmp_path / "filtered")) == rows[1:]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    with pytest.raises(errors.UserError, match="holds the splits test, train; name one, as .*/two"):
        readers.stream(str(tmp_path / "two"))
    assert values(str(tmp_path / "two" / "test")) == rows
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(errors.UserError, match="names 3 files, of which 1 are missing"):
        readers.stream(str(tmp_path / "one"))


def test_what_datasets_reads_into_values_that_are_text(tmp_path: pathlib.Path) -> None:
    """Why the readers are ours: types are inferred there, from all the values of a column."""
    import datasets

    rows = [{"prompt": "007", "response": "1.10"}, {"prompt": "8", "response": "NA"}]
    path = str(tmp_path / "a.csv")
    pathlib.Path(path).write_text("prompt,response\n007,1.10\n8,NA\n")
    theirs = datasets.load_dataset(
        "csv", data_files=path, cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert list(theirs) == [{"prompt": 7, "response": 1.1}, {"prompt": 8, "response": None}]
    assert values(path) == rows


def test_hub_names(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"prompt": text, "response": text[::-1]} for text in AWKWARD]
    held = datasets.Dataset.from_list(rows)
    asked: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None = None, *, split: str | None = None, **more: Any) -> Any:
        asked.append((name, subset, split))
        assert not more  # no code of the set's own is ever run
        return held if split else datasets.DatasetDict(train=held, test=held)

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.load.cache_clear()
    assert values("owner/name:test") == rows
    assert values("owner/name:sub:test") == rows
    assert values("name:train") == rows
    assert asked == [
        ("owner/name", None, "test"),
        ("owner/name", "sub", "test"),
        ("name", None, "train"),
    ]
    table = formats.Table("owner/name:test")
    assert (table.files, len(list(table))) == (("owner/name:test",), len(rows))
    assert len(asked) == 3  # kept
    first = next(iter(table))
    assert isinstance(first, examples.Example) and first.source == "owner/name:test:row 1"
    with pytest.raises(errors.UserError, match="has the splits train, test; name one, as owner/n"):
        formats.Table("owner/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    for source in (
        "runs/none",
        "./x/y",
        "data/a.jsonl",
        "a.jsonl",
        "name",
        "/a/b",
        "runs",
        "runs:x",
    ):
        assert not hub.is_name(source), source


@pytest.mark.parametrize(
    "error, told",
    [
        (
            ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."),
            "Should be one of ['train', 'test'].; name one of these splits",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"),
            "['main', 'socratic']; name a subset, as owner/name:SUBSET:SPLIT",
        ),
        (
            ConnectionError("Couldn't reach the Hub"),
            "; check the network; a file is named with its ext",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "is not run; sav",
        ),
        (ValueError("Dataset 'x' is a gated dataset on the Hub."), "ask for access on its page"),
        (KeyError("whatever"), "'whatever'; check the name; a file is named with its extension"),
    ],
)
def test_hub_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.load.cache_clear()
    with pytest.raises(errors.UserError) as caught:
        readers.stream("owner/name:tset")
    message = str(caught.value)
    assert message.startswith("owner/name:tset: no data set from the Hub: ") and told in message
    assert "\n" not in message
