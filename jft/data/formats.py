# SPDX-License-Identifier: Apache-2.0
"""A source's rows as examples: every row once, as an `Example` or as the `Fault` that says why it is none."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jft import errors
from jft.data import build, examples, readers, records, shapes, turns

Shape = shapes.Shape

# Rows looked at before it is said that the columns are not understood.
_PEEK = 1000
# Sets of columns remembered; where every row has its own, memory must not grow with them.
_PLANS = 1000


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are understood.

    `columns` has a column's name, or its place from 0, by role (`shapes.ROLES`); an empty name means not given.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    header: bool = True  # CSV and TSV begin with a line of names; else these are "0", "1", ...
    separator: str = ""  # splits the text into a prompt, up to and with it, and the response


class Table:
    """The rows of a source, read anew by each iteration, a few at a time.

    Attributes:
        files: that are read.
        shape: what the columns are, known from the first row that can be used; None if there is none.
    """

    def __init__(self, source: str, reading: Reading = Reading()) -> None:
        """Looks at the first rows.

        Raises:
            errors.UserError: the source can't be found, holds no row, or its columns are not understood.
        """
        self.source, self.reading = source, reading
        self.files = readers.files(source)
        self._seen: dict[str, None] = {}
        self._used: set[str] = set()
        self._given = shapes.check_columns(reading.columns, reading.separator)
        self.shape: Shape | None = None
        self.shape = self._peek()

    @property
    def extra(self) -> tuple[str, ...]:
        """Columns that nothing reads; complete after an iteration."""
        return tuple(name for name in self._seen if name not in self._used)

    def __iter__(self) -> Iterator[examples.Example | examples.Fault]:
        plans: dict[tuple[str, ...], _Plan] = {}
        for record in readers.stream(self.source, header=self.reading.header):
            if isinstance(record, examples.Fault):
                yield record
                continue
            try:
                row = _columns(record.value)
                names = tuple(row)
                if names not in plans:
                    if len(plans) > _PLANS:
                        plans.clear()
                    plans[names] = self._plan(row)
                fields = plans[names].fields(row)
            except errors.UserError as error:
                kind = "empty" if isinstance(error, turns.Empty) else "malformed"
                yield records.fault(record.path, record.number, str(error), kind=kind)
            else:
                place = f"{record.path}:row {record.number}"
                yield examples.Example(
                    source=place, path=record.path, number=record.number, **fields
                )

    def _peek(self) -> Shape | None:
        """The shape of the first row that can be used; else of the first whose columns are understood."""
        first: Shape | None = None
        misread, whole, rows = "", "", 0
        stream = readers.stream(self.source, header=self.reading.header)
        for record in itertools.islice(stream, _PEEK):
            if isinstance(record, examples.Fault):
                whole = whole or (record.message if record.number == 0 else "")
                continue
            rows += 1
            try:
                row = _columns(record.value)
                shape = shapes.recognise(row, self._given, self.reading.separator)
            except errors.UserError as error:
                place = f"{record.path}:row {record.number}"
                misread = misread or f"{place}: {records.cut(str(error))}"
                continue
            first = first or shape
            if _usable(row, shape):
                return shape
        if whole and not rows:
            raise errors.UserError(whole)
        if misread and first is None:
            raise errors.UserError(misread)
        return first

    def _plan(self, row: Mapping[str, Any]) -> "_Plan":
        shape = self._shape_of(row)
        self.shape = self.shape or shape
        self._seen.update(dict.fromkeys(row))
        self._used.update(shape.columns.values())
        return _Plan.of(shape, row)

    def _shape_of(self, row: Mapping[str, Any]) -> Shape:
        """A row's shape, which has to be that of the rows before; optional columns may come and go."""
        first = self.shape
        if first is None:
            return shapes.recognise(row, self._given, self.reading.separator)
        missing = [name for name in first.required.values() if name not in row]
        if missing:
            raise errors.UserError(
                f"has no column {missing[0]!r}, and the file's rows are {first.describe()}; "
                "one file holds one shape: mend the row or take it out"
            )
        shape = shapes.recognise(row, self._given, self.reading.separator)
        if first.kind == "unpaired" and "label" not in shape.columns:
            columns = {**shape.columns, "label": first.columns["label"]}
            shape = Shape("unpaired", columns, stated=first.stated)
        if shape.required != first.required:
            raise errors.UserError(
                f"is {shape.describe()}, and the file's rows are {first.describe()}; "
                "one file holds one shape: mend the row or take it out"
            )
        return shape


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is done with rows of the same columns."""

    shape: Shape
    labels: tuple[str, ...]  # columns called label that the shape does not read

    @classmethod
    def of(cls, shape: Shape, row: Mapping[str, Any]) -> "_Plan":
        used = {*shape.columns.values()}
        labels = [name for name in row if name.strip().lower() == "label" and name not in used]
        return cls(shape, tuple(labels) if shape.kind in _LABELLED else ())

    def fields(self, row: Mapping[str, Any]) -> build.Fields:
        for name in self.labels:
            if isinstance(row[name], bool):
                raise errors.UserError(
                    f"column {name!r} is true or false, and it was not in the first row; "
                    f"set data.columns.label={name}, or leave the column out"
                )
        return build.build(row, self.shape)


_LABELLED = ("messages", "prompt/response", "alpaca")


def _usable(row: Mapping[str, Any], shape: Shape) -> bool:
    try:
        build.build(row, shape)
    except errors.UserError:
        return False
    return True


def read(source: str, reading: Reading = Reading()) -> list[examples.Example]:
    """The examples of a source.

    Raises:
        errors.UserError: the source or one of its rows can't be used; tells the first such row.
    """
    found: list[examples.Example] = []
    for row in Table(source, reading):
        if isinstance(row, examples.Fault):
            raise errors.UserError(row.message)
        found.append(row)
    return found


def _columns(value: Any) -> Mapping[str, Any]:
    """A row by its columns; a list's columns are called by their places."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value:
        if isinstance(value[0], dict):
            raise errors.UserError(
                f"holds a list of {len(value)}, not an object; if these are rows, write each in a line, "
                "or give the file's name the ending .json"
            )
        return {str(i): held for i, held in enumerate(value)}
    raise errors.UserError(
        f"holds {readers.kind(value)}, not an object; write {{column: value, ...}}"
    )
