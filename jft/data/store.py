# SPDX-License-Identifier: Apache-2.0
"""Tokenised rows on disk: written once as a stream, then read through a memory map.

A folder holds `rows.arrow` (tokens and what is trained of each row), `examples.arrow` (what they came from), a few
arrays with one number per row, and `meta.json`. It is made under another name and renamed when it is whole, so a folder
that exists is complete, whoever else writes at the same time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jft.data import examples, rows

# Rows in one record batch: the i-th row is in the batch i // BATCH.
BATCH = 1024
_ARRAYS = {
    "lengths": np.int32,
    "trained": np.int32,
    "example": np.int64,
    "file": np.int32,
    "number": np.int64,
}


class Writer:
    """Writes a folder; use it with `with`, and `finish` it: what is not finished is taken away.

    `files` are those that examples come from. They are noted by their places in it: equal files elsewhere give equal rows.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str]) -> None:
        self._target = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._part = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.part", dir=folder.parent))
        self._rows = _Table(self._part / "rows.arrow", _row_schema())
        self._examples = _Table(self._part / "examples.arrow", _example_schema())
        self._pending: list[tuple[rows.Row, int]] = []
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        self._files = {path: number for number, path in enumerate(files)}
        self._digest = hashlib.sha256()
        self._largest = (-1, -1)  # token, row
        self.rows = self.examples = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for table in (self._rows, self._examples):
            table.close()
        shutil.rmtree(self._part, ignore_errors=True)

    def add(self, some: Sequence[examples.Example], encoded: Sequence[Sequence[rows.Row]]) -> None:
        """Appends examples with their rows."""
        texts = [json.dumps(_contents(example), ensure_ascii=False) for example in some]
        for text in texts:
            self._digest.update(text.encode())
        self._examples.write(texts)
        files = [self._files[example.path] for example in some]
        self._arrays["file"].append(np.array(files, np.int32))
        self._arrays["number"].append(np.array([example.number for example in some], np.int64))
        for example, found in enumerate(encoded, start=self.examples):
            self._pending += [(row, example) for row in found]
        self.examples += len(some)
        while len(self._pending) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        some, self._pending = self._pending[:BATCH], self._pending[BATCH:]
        found = [row for row, _ in some]
        lengths = np.array([len(row.tokens) for row in found], np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.concatenate([row.tokens for row in found])
        trained = np.concatenate([row.trained for row in found]).view(np.uint8)
        self._rows.write(*(_lists(offsets, values) for values in (tokens, trained)))
        self._arrays["lengths"].append(lengths - 1)
        targets = [np.count_nonzero(row.trained[1:]) for row in found]
        self._arrays["trained"].append(np.array(targets, np.int32))
        self._arrays["example"].append(np.array([example for _, example in some], np.int64))
        at = int(tokens.argmax())
        row = self.rows + int(np.searchsorted(offsets, at, side="right")) - 1
        self._largest = max(self._largest, (int(tokens[at]), row))
        self.rows += len(some)

    def finish(self, meta: dict[str, Any]) -> None:
        """Writes what is left and puts the folder in its place."""
        if self._pending:
            self._flush()
        self._rows.close()
        self._examples.close()
        for name, parts in self._arrays.items():
            np.save(
                self._part / f"{name}.npy", np.concatenate([np.zeros(0, _ARRAYS[name]), *parts])
            )
        own = {
            "examples": self.examples,
            "largest_token": self._largest[0],
            "largest_token_row": self._largest[1],
            "fingerprint": f"sha256:{self._digest.hexdigest()[:32]}",
        }
        (self._part / "meta.json").write_text(json.dumps(meta | own), encoding="utf-8")
        try:
            os.rename(self._part, self._target)
        except OSError:
            if not self._target.is_dir():  # another process has made it meanwhile
                raise


class Stored:
    """The rows of a folder, as `rows.Rows`; each is read when it is asked for."""

    def __init__(self, folder: pathlib.Path, files: Sequence[str]) -> None:
        self.files = tuple(files)  # as they are called now
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.lengths, self.trained = arrays["lengths"], arrays["trained"]
        self.example_of = arrays["example"]  # the example of each row
        self._file, self._number = arrays["file"], arrays["number"]
        self._rows = _open(folder / "rows.arrow")
        self._examples = _open(folder / "examples.arrow")
        self._views: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> rows.Row:
        batch, at = divmod(index, BATCH)
        if batch not in self._views:
            self._views[batch] = _views(self._rows.get_batch(batch))
        offsets, tokens, trained = self._views[batch]
        place = slice(offsets[at], offsets[at + 1])
        return rows.Row(tokens[place], trained[place], self._source(int(self.example_of[index])))

    def example(self, index: int) -> examples.Example:
        """The index-th example, of those that have rows and those that have none."""
        batch, at = divmod(index, BATCH)
        return self._decode(self._examples.get_batch(batch).column(0)[at].as_py(), index)

    def read_examples(self) -> Iterator[examples.Example]:
        """All of them, in order."""
        for batch in range(self._examples.num_record_batches):
            texts = self._examples.get_batch(batch).column(0).to_pylist()
            for at, text in enumerate(texts):
                yield self._decode(text, batch * BATCH + at)

    def _decode(self, text: str, index: int) -> examples.Example:
        contents = json.loads(text)
        for name in ("messages", "tools", "rejected"):
            contents[name] = tuple(contents.get(name, ()))
        path, number = self.place(index)
        return examples.Example(**contents, source=f"{path}:row {number}", path=path, number=number)

    def place(self, example: int) -> tuple[str, int]:
        """The file of an example and its row in it."""
        return self.files[self._file[example]], int(self._number[example])

    def _source(self, example: int) -> str:
        path, number = self.place(example)
        return f"{path}:row {number}"


def _contents(example: examples.Example) -> dict[str, Any]:
    """What the row says, without its place and what is empty."""
    fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    places = ("source", "path", "number")
    kept = {k: v for k, v in fields.items() if k not in places and v not in ((), "", None, 0)}
    # A label may be False, which equals 0.
    return (
        kept
        | {"messages": example.messages}
        | ({} if example.label is None else {"label": example.label})
    )


class _Table:
    """An Arrow file that is written in record batches of exactly BATCH rows."""

    def __init__(self, path: pathlib.Path, schema: Any) -> None:
        import pyarrow

        self._schema = schema
        self._file = pyarrow.ipc.new_file(path, schema)
        self._pending: Any = None

    def write(self, *columns: Any) -> None:
        import pyarrow

        arrays = [
            pyarrow.array(column, field.type) if isinstance(column, list) else column
            for column, field in zip(columns, self._schema, strict=True)
        ]
        new = pyarrow.Table.from_arrays(arrays, schema=self._schema)
        table = new if self._pending is None else pyarrow.concat_tables([self._pending, new])
        whole = len(table) - len(table) % BATCH
        for at in range(0, whole, BATCH):
            self._write(table.slice(at, BATCH))
        self._pending = table.slice(whole)

    def _write(self, table: Any) -> None:
        for batch in table.combine_chunks().to_batches():
            self._file.write_batch(batch)

    def close(self) -> None:
        if self._pending is not None and len(self._pending):
            self._write(self._pending)
        self._pending = None
        self._file.close()


def _open(path: pathlib.Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))


def _views(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, tokens and what is trained of a record batch, as views of the file."""
    tokens, trained = batch.columns
    return tokens.offsets.to_numpy(), tokens.values.to_numpy(), trained.values.to_numpy().view(bool)


def _lists(offsets: np.ndarray, values: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


def _row_schema() -> Any:
    import pyarrow

    lists = {"tokens": pyarrow.int32(), "trained": pyarrow.uint8()}
    return pyarrow.schema([(name, pyarrow.list_(kind)) for name, kind in lists.items()])


def _example_schema() -> Any:
    import pyarrow

    return pyarrow.schema([("contents", pyarrow.string())])
