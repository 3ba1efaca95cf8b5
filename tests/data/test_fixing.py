# SPDX-License-Identifier: Apache-2.0
"""The cleaned file: what was found is gone, what was kept is unchanged, and nothing is half written."""

import csv
import json
import pathlib
import random
from typing import Any

import pytest

from jft import errors
from jft.data import checks, findings, fixing, formats

ZEROS = "The result is " + "0" * 900
SECRET = "AK" + "IA" + "Q3EGRWTZ7PLMVK2D"
DAMAGED = "her fiancé Cal".encode().decode("latin-1")

# prompt, response, and what becomes of the row
ROWS = [
    ("a", "007", ""),
    ("b", "I am {{name}}.", "placeholder"),
    ("c", "kept", ""),
    ("c", "kept", "duplicate"),
    ("d", ZEROS, "repetition"),
    ("e", " \n", "empty"),
    ("f", f"the key is {SECRET}", "secret"),
    ("g", DAMAGED, "repaired"),
    ("h", "lost \ufffd", "left"),
    ("i", 'line\u2028 end, "quoted", no tab\u0085', ""),
    ("c", "another", ""),
    ("leaked", "x", "leak"),
    ("j", "call 212-664-7665", ""),
]


def rows() -> list[dict[str, Any]]:
    return [{"id": f"{n:03d}", "prompt": p, "response": r} for n, (p, r, _) in enumerate(ROWS)]


def write(path: pathlib.Path, table: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(table), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            writer = csv.writer(file, **(form if path.suffix == ".tsv" else {}))
            writer.writerow(table[0])
            writer.writerows(row.values() for row in table)
    return str(path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line]
    if path.suffix == ".json":
        return json.loads(text)
    with open(path, encoding="utf-8", newline="") as file:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        return list(csv.DictReader(file, **form))


def check(
    source: str, valid: str = "", reading: formats.Reading | None = None
) -> list[findings.Finding]:
    examination = checks.Examination(languages=False)
    for row in formats.Table(source, reading or formats.Reading()):
        examination.add(row)
    for row in formats.Table(valid) if valid else ():
        examination.add(row, valid=True)
    return examination.findings()


def fix(source: str, out: pathlib.Path, told: list[findings.Finding]) -> dict[str, Any]:
    return fixing.fix(source, formats.Reading(), told, str(out))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("source", [".jsonl", ".csv"])
def test_what_was_found_is_gone_and_the_rest_unchanged(
    tmp_path: pathlib.Path, source: str, ending: str
) -> None:
    table = rows()
    path = write(tmp_path / f"data{source}", table)
    valid = write(tmp_path / "valid.jsonl", [{"prompt": "Leaked!", "response": "x"}])
    out = tmp_path / f"clean{ending}"
    report = fix(path, out, check(path, valid))

    fates = [fate for _, _, fate in ROWS]
    gone = [fate for fate in fates if fate not in ("", "repaired", "left")]
    assert report["removed"] == {kind: gone.count(kind) for kind in dict.fromkeys(gone)}
    assert (report["repaired"], report["left"]) == ({"encoding": 1}, {"encoding": 1})
    assert report["rows"] == len(table) == report["kept"] + sum(report["removed"].values())
    expected = [dict(row) for row, fate in zip(table, fates, strict=True) if fate not in gone]
    next(row for row in expected if row["prompt"] == "g")["response"] = "her fiancé Cal"
    assert read(out) == expected  # in order, other columns too

    again = check(str(out), valid)
    assert not [finding for finding in again if finding.details.get("fix") == "remove"]
    assert [finding.kind for finding in again] == ["conflict", "encoding", "personal_data"]


def test_the_message_says_what_changed(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "data.jsonl", rows())
    message = fix(path, tmp_path / "clean.jsonl", check(path))["message"]
    assert "\n" not in message
    for told in ("8 of 13 rows written", "1 row removed as secret", "1 row repaired (encoding)"):
        assert told in message
    assert SECRET not in message


def test_json_values_stay_exactly(tmp_path: pathlib.Path) -> None:
    """Numbers, nested values, key order and columns that training does not read."""
    extra = {"n": 10**30, "x": 0.1, "deep": [{"b": None, "a": [True, "é\u2028"]}], "": -0.0}
    table = [{"z": n, "prompt": f"p{n}", "response": f"r{n}", **extra} for n in range(4)]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in [*table, table[0]]]
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "clean.jsonl"
    report = fix(str(path), out, check(str(path)))
    assert report["removed"] == {"duplicate": 1}
    assert out.read_text(encoding="utf-8").removesuffix("\n").split("\n") == lines[:4]


def test_unreadable_rows_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "p", "response": "r"}\n'
    other = good.replace('"p"', '"q"')
    path.write_text(good + '{"prompt": "p" "x"}\n\n' + other + '{"prompt": 5, "response": "r"}\n')
    out = tmp_path / "clean.jsonl"
    report = fix(str(path), out, check(str(path)))
    assert (report["rows"], report["kept"], report["removed"]) == (4, 2, {"malformed": 2})
    assert check(str(out)) == []
    assert [row["prompt"] for row in read(out)] == ["p", "q"]


def test_many_rows_add_up(tmp_path: pathlib.Path) -> None:
    rng = random.Random(0)
    kinds = ["plain {}", "I am {{{{name}}}} {}", "0" * 900 + "{}", "same", ""]
    table = [{"prompt": "q", "response": rng.choice(kinds).format(n)} for n in range(300)]
    path = write(tmp_path / "data.jsonl", table)
    out = tmp_path / "clean.jsonl"
    report = fix(path, out, check(path))
    assert report["rows"] == 300 == len(read(out)) + sum(report["removed"].values())
    plain = [row for row in table if row["response"].startswith("plain")]
    assert [row for row in read(out) if row["response"] != "same"] == plain
    assert sum(row["response"] == "same" for row in read(out)) == 1


def test_several_files_become_one(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "s"}])
    write(folder / "b.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "t", "response": "u"}])
    out = tmp_path / "clean.jsonl"
    assert fix(str(folder), out, check(str(folder)))["removed"] == {"duplicate": 1}
    assert [row["prompt"] for row in read(out)] == ["p", "q", "t"]


def test_rows_of_other_files_are_left_alone(tmp_path: pathlib.Path) -> None:
    """A finding in the validation set is no reason to take a training row of the same number out."""
    train = write(
        tmp_path / "train.jsonl", [{"prompt": f"p{n}", "response": "r"} for n in range(3)]
    )
    valid = write(tmp_path / "valid.jsonl", [{"prompt": "v", "response": ZEROS}] * 2)
    report = fix(train, tmp_path / "clean.jsonl", check(train, valid))
    assert (report["kept"], report["removed"]) == (3, {})


def test_csv_without_a_header_stays_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('"a, b",r\nq,"s\nt"\nq,"s\nt"\n')
    reading = formats.Reading(columns={"prompt": "0", "response": "1"}, header=False)
    out = tmp_path / "clean.csv"
    report = fixing.fix(str(path), reading, check(str(path), reading=reading), str(out))
    assert report["removed"] == {"duplicate": 1}
    assert list(csv.reader(out.open(newline=""))) == [["a, b", "r"], ["q", "s\nt"]]


FAULTS = {
    "ending": (
        [{"prompt": "p", "response": "r"}],
        "clean.parquet",
        "written as .jsonl, .json, .csv, .tsv",
    ),
    "tab": ([{"prompt": "p", "response": "a\tb"}], "clean.tsv", "tab or a line end"),
    "number": (
        [{"prompt": "p", "response": "r", "n": 5}],
        "clean.csv",
        r"row 1: column 'n' is a number \(5\)",
    ),
    "columns": (
        [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "r", "x": "y"}],
        "clean.csv",
        "row 2: has other columns than the first row; write .jsonl",
    ),
    "nothing": (
        [{"prompt": "p", "response": ZEROS}],
        "clean.jsonl",
        "no row would be left: 1 row removed",
    ),
    "itself": ([{"prompt": "p", "response": "r"}], "data.jsonl", "is the data itself"),
    "folder": ([{"prompt": "p", "response": "r"}], "nowhere/clean.jsonl", "can't be written"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_leave_no_file(tmp_path: pathlib.Path, name: str) -> None:
    table, out, message = FAULTS[name]
    path = write(tmp_path / "data.jsonl", table)
    before = pathlib.Path(path).read_bytes()
    with pytest.raises(errors.UserError, match=message) as caught:
        fix(path, tmp_path / out, check(path))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]
    assert pathlib.Path(path).read_bytes() == before


def test_an_older_file_is_replaced_only_by_a_whole_one(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "clean.csv"
    out.write_text("old")
    bad = write(tmp_path / "bad.jsonl", FAULTS["number"][0])
    with pytest.raises(errors.UserError):
        fix(bad, out, [])
    assert out.read_text() == "old"
    good = write(tmp_path / "good.jsonl", [{"prompt": "p", "response": "r"}])
    fix(good, out, [])
    assert read(out) == [{"prompt": "p", "response": "r"}]
