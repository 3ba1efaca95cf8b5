# SPDX-License-Identifier: Apache-2.0
"""Files to rows: every value as it stands, whatever the format, the compression and the size of the file."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from jft import errors
from jft.data import examples, formats, json_rows, readers

# What readers that infer types, split lines or strip values get wrong.
AWKWARD = [
    "007",
    "1e5",
    "1.10",
    "NA",
    "null",
    "True",
    "2024-01-02",
    " spaced ",
    "a\u2028b\u0085c\u00a0",
    'say "x"',
    "5' 3\"",
    "é\ufeff",
    "a;b,c|d",
    "\U0001f600 \u200d",
    "=1+1",
    "\\n stays",
    "#no comment",
]
LINES = ["two\nlines", "three\r\nmore\r", 'a "b",\n"c"', "tab\there"]  # a TSV can't hold these


def write(folder: pathlib.Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def arrow_table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    kinds = (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    columns = {
        name: pyarrow.array([row[name] for row in rows]).cast(kind)
        for name, kind in zip(rows[0], kinds, strict=True)
    }
    return pyarrow.table(columns)


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(arrow_table(rows), out, row_group_size=3)
    return out.getvalue()


def as_arrow(rows: list[dict[str, Any]], stream: bool = False) -> bytes:
    import pyarrow.ipc

    out, table = io.BytesIO(), arrow_table(rows)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return out.getvalue()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_tsv(rows: list[dict[str, Any]]) -> bytes:
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    return "".join(f"{line}\r\n" for line in lines).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lambda rows: jsonl(*rows).encode(),
    "ndjson": lambda rows: json.dumps(rows[0]).encode() + b"\r\n" + jsonl(*rows[1:]).encode(),
    "json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "csv": as_csv,
    "tsv": as_tsv,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "stream.arrow": lambda rows: as_arrow(rows, stream=True),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def values(source: str, **settings: Any) -> list[Any]:
    """The values of all rows, of which none may be a fault."""
    found = []
    for row in readers.stream(source, **settings):
        assert isinstance(row, readers.Record), row
        found.append(row.value)
    return found


def faults(source: str) -> list[str]:
    return [row.message for row in readers.stream(source) if isinstance(row, examples.Fault)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("packed", PACKERS)
def test_awkward_values_survive_every_format(
    tmp_path: pathlib.Path, kind: str, packed: str
) -> None:
    texts = AWKWARD if kind == "tsv" else AWKWARD + LINES
    rows = [{"prompt": text, "response": text[::-1]} for text in texts]
    path = write(tmp_path, f"rows.{kind}{packed}", PACKERS[packed](WRITERS[kind](rows)))
    assert values(path) == rows
    assert [row.number for row in readers.stream(path)] == list(range(1, len(rows) + 1))


def test_a_folder_is_its_files_by_name(tmp_path: pathlib.Path) -> None:
    parts = {"b.csv": ["3", "4"], "a.csv.gz": ["1", "2"], "c.csv": ["5"]}
    for name, texts in parts.items():
        data = as_csv([{"prompt": text, "response": "r"} for text in texts])
        write(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    for name in (".hidden.csv", "_part.csv", "README.txt", "LICENSE-of-data.txt", "notes.md"):
        write(tmp_path, name, "nothing")
    write(tmp_path, "dataset_info.json", "{}")
    found = list(readers.stream(str(tmp_path)))
    assert [row.value["prompt"] for row in found] == list("12345")  # type: ignore[union-attr]
    assert [(pathlib.Path(row.path).name, row.number) for row in found] == [
        ("a.csv.gz", 1),
        ("a.csv.gz", 2),
        ("b.csv", 1),
        ("b.csv", 2),
        ("c.csv", 1),
    ]


def test_folders_that_leave_open_what_is_meant(tmp_path: pathlib.Path) -> None:
    def refused(*names: str) -> str:
        folder = tmp_path / "-".join(names).replace("/", "_")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder, name, jsonl({"prompt": "p", "response": "r"}))
        with pytest.raises(errors.UserError) as caught:
            readers.stream(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{folder}: ")

    assert refused("train.jsonl", "valid.jsonl") == (
        "the folder holds several splits (train.jsonl, valid.jsonl); name one file"
    )
    assert refused("devset.csv", "trainset.csv").startswith("the folder holds several splits")
    assert refused("a.jsonl", "b.csv") == (
        "the folder holds files of several kinds (a.jsonl, b.csv); name one file"
    )
    assert refused("data/a.jsonl", "README.md").endswith("; its folders are data: name one")
    assert refused("README.md").startswith("the folder holds no data file (.jsonl, .ndjson,")
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(2):
        write(shards, f"train-0000{i}-of-00002.jsonl", jsonl({"prompt": str(i)}))
    assert values(str(shards)) == [{"prompt": "0"}, {"prompt": "1"}]


def test_bom_line_ends_and_blank_lines_are_no_content(tmp_path: pathlib.Path) -> None:
    bom, row = b"\xef\xbb\xbf", b'{"a": "b"}'
    path = write(tmp_path, "a.jsonl", bom + row + b"\r\n\r\n \t\n" + bom + row)
    assert [(row.number, row.value) for row in readers.stream(path)] == [  # type: ignore[union-attr]
        (1, {"a": "b"}),
        (4, {"a": "b"}),
    ]
    for name, content in {
        "a.csv": bom + b'a,b\r\n"1\r\n2",3\r\n\r\n4,5',
        "b.csv": b'a,b\r"1\r\n2",3\r\r4,5\r',
        "c.json": bom + b' [{"a":"1\\r\\n2","b":"3"}\r\n,\t{"a":"4","b":"5"} ]\n\n',
    }.items():
        path = write(tmp_path, name, content)
        assert values(path) == [{"a": "1\r\n2", "b": "3"}, {"a": "4", "b": "5"}], name
    path = write(tmp_path, "a.tsv", bom + b'a\tb\n"1\t2"\n\n')
    assert values(path) == [{"a": '"1', "b": '2"'}]
    path = write(tmp_path, "a.txt", bom + b" a\r\nb\n")
    assert values(path) == [{"text": " a\r\nb\n"}]


def test_json_lines_under_the_name_json(tmp_path: pathlib.Path) -> None:
    rows = [{"a": "b" * 100_000}, {"a": [1, {"c": None}]}, {}]
    assert values(write(tmp_path, "a.json", "\ufeff\n" + jsonl(*rows))) == rows
    path = write(tmp_path, "b.json", jsonl(*rows) + "{no}\n" + jsonl({"a": 1}))
    assert [row.number for row in readers.stream(path)] == [1, 2, 3, 4, 5]
    assert len(faults(path)) == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_json_list_read_in_pieces_is_the_list(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = [*AWKWARD, -12.5e3, 10, [], {}, True, None, [[1, 2], {"a": "\U0001f600\\"}], "x" * 300]
    for indent in (None, 2):
        text = json.dumps(rows, indent=indent, ensure_ascii=chunk % 2 == 0)
        path = write(tmp_path, "a.json", text)
        monkeypatch.setattr(json_rows, "_CHUNK", chunk)
        assert values(path) == rows


def test_faults_of_a_row_end_with_the_row(tmp_path: pathlib.Path) -> None:
    lines = ['{"a": 1}', '{"a": }', '{"a": "\udcff"}', '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 2}']
    for name, text in {
        "a.jsonl": "\n".join(lines),
        "b.csv": "a,b\n1,2\n3\n\udcff,4\n5,6,7\n8,9\n",
        "c.json": f"[{', '.join(lines[:1] + lines[2:])}]",
    }.items():
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        found = list(readers.stream(str(path)))
        good = [row.number for row in found if isinstance(row, readers.Record)]
        assert good == [1, len(found)], name
        assert [row.number for row in found] == list(range(1, len(found) + 1)), name


def test_what_was_read_before_a_damaged_place_is_kept(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": f"{i * 7919 % 9973}", "response": "r" * (i % 50)} for i in range(20_000)]
    for kind in ("jsonl", "json", "csv"):
        data = WRITERS[kind](rows)
        for packed in (".gz", ".xz", ".bz2"):
            whole = PACKERS[packed](data)
            path = write(tmp_path, f"a.{kind}{packed}", whole[: len(whole) * 3 // 4])
            *good, last = readers.stream(path)
            assert [row.value for row in good] == rows[: len(good)]  # type: ignore[union-attr]
            assert isinstance(last, examples.Fault)
            if good:
                assert last.number == len(good) + 1
                assert f"nothing from row {last.number} on could be read" in last.message
            if packed == ".gz":  # the others' blocks are longer than this file
                assert len(good) > len(rows) // 2


def test_memory_stays_flat(tmp_path: pathlib.Path) -> None:
    def peak(count: int, kind: str) -> int:
        rows = [{"prompt": "x" * 4000, "response": str(i)} for i in range(count)]
        path = write(tmp_path, f"{count}.{kind}", WRITERS[kind](rows))
        tracemalloc.start()
        assert sum(1 for _ in formats.Table(path)) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    for kind in ("jsonl", "json", "csv", "parquet"):
        assert peak(4_000, kind) < peak(1_500, kind) + 500_000, kind


def test_hundred_megabytes_in_a_line(tmp_path: pathlib.Path) -> None:
    long = "x" * 100_000_000
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        file.write(f'{{"a": "{long}"}}\n{{"a": "y"}}\n')
    assert [len(row["a"]) for row in values(str(path))] == [len(long), 1]


def test_names_of_any_length_and_kind_are_told_in_a_line(tmp_path: pathlib.Path) -> None:
    """Found by fuzzing."""
    for name in ("x" * 70_000, "a\nb\rc", "\u2028"):
        for kind in ("jsonl", "csv"):
            path = write(tmp_path, f"a.{kind}", WRITERS[kind]([{name: "1", "text": "t"}]))
            with pytest.raises(errors.UserError) as caught:
                formats.Table(path)
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 1500


def test_a_file_that_can_not_be_read_leaves_the_others(tmp_path: pathlib.Path) -> None:
    good = jsonl({"prompt": "p", "response": "r"})
    write(tmp_path, "a.jsonl", good.encode("utf-16"))
    write(tmp_path, "b.jsonl", good)
    write(tmp_path, "c.jsonl", "")
    found = list(formats.Table(str(tmp_path)))
    assert [type(row) for row in found] == [examples.Fault, examples.Example, examples.Fault]
    assert [row.number for row in found] == [0, 1, 0]


def test_a_missing_file_is_told_at_once(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "train.jsonl", jsonl({}))
    for source, told in {
        "trian.jsonl": "no such file; the folder holds train.jsonl",
        "none/train.jsonl": "no such file (nor a folder",
        "a\nb.jsonl": "no file name: it holds control characters",
        "x" * 300 + ".jsonl": "cannot be read: File name too long",
    }.items():
        with pytest.raises(errors.UserError) as caught:
            readers.stream(str(tmp_path / source))
        assert told in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(errors.UserError, match="unknown extension '.xlsx'; known are .jsonl, .nd"):
        readers.files(write(tmp_path, "a.xlsx", b"PK"))
