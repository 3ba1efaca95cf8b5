# SPDX-License-Identifier: Apache-2.0
"""`jft check` as it is used: its object, its report, its exit codes, and no row lost between reading and training."""

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jft import check, cli, models, outliers
from jft.data import formats, lengths

# One of each: good, good, empty, bad type, the same as the first, long, control token, dangerous characters.
ROWS: list[dict[str, Any]] = [
    {"prompt": "one?", "response": "red"},
    {"prompt": "two?", "response": "green"},
    {"prompt": "", "response": "blue"},
    {"prompt": 3, "response": "blue"},
    {"prompt": "one?", "response": "red"},
    {"prompt": "the user asks " * 30, "response": "hello"},
    {"prompt": "say <|im_end|> now", "response": "no"},
    {"prompt": "\x1b[31m[bold]red[/bold]", "response": "\u202eblue"},
]
KEYS = {"kind", "severity", "count", "left_out", "rows", "message", "advice", "details"}


def write(path: pathlib.Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write(pathlib.Path("data.jsonl"), ROWS)


def jft(capsys: Any, *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["check", *arguments]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def found(capsys: Any, *arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(jft(capsys, *arguments, "--json", code=code))


def refusal(capsys: Any, *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["check", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("jft: ")


def rows_of(report: dict[str, Any], kind: str) -> list[Any]:
    return next((f["rows"] for f in report["findings"] if f["kind"] == kind), [])


def left_out(report: dict[str, Any]) -> int:
    return sum(finding["left_out"] for finding in report["findings"])


# ---- the object


def test_text_alone(data: str, capsys: Any) -> None:
    report = found(capsys, data, code=1)
    assert report["rows"] == len(ROWS) and report["files"] == [data]
    assert "prompt" in report["shape"] and "response" in report["shape"]
    assert all(set(finding) == KEYS for finding in report["findings"])
    assert rows_of(report, "malformed") == [4] and rows_of(report, "empty") == [3]
    assert 5 in rows_of(report, "duplicate")
    assert report["trained_rows"] == len(ROWS) - left_out(report) == len(ROWS) - 2
    assert "tokens" not in report["statistics"]
    words = [
        len(f"{r['prompt']} {r['response']}".split()) for r in ROWS if r["prompt"] not in ("", 3)
    ]
    assert report["statistics"]["words"]["total"] == sum(words)
    assert report["statistics"]["words"]["max"] == max(words)
    assert sum(entry["rows"] for entry in report["statistics"]["histogram"]["bins"]) == len(words)


@pytest.mark.parametrize("overlength", ["error", "drop", "truncate_prompt", "split"])
@pytest.mark.parametrize("limit", [4, 60, 1000])
def test_rows_are_trained_on_or_reported(
    overlength: str, limit: int, data: str, tiny_model: pathlib.Path, capsys: Any
) -> None:
    flags = (f"--tokenizer={tiny_model}", f"--max_length={limit}", f"--overlength={overlength}")
    report = found(capsys, data, *flags, code=1)
    assert report["rows"] == len(ROWS) == report["trained_rows"] + left_out(report)
    severity = {finding["kind"]: finding["severity"] for finding in report["findings"]}
    if limit == 60:  # one row is longer
        kind = "dropped" if overlength in ("error", "drop") else "truncated"
        assert rows_of(report, kind) == [6]
        assert severity[kind] == {"error": "error", "split": "note"}.get(overlength, "warning")
    if limit == 1000:
        assert not {"dropped", "truncated"} & severity.keys()
    if limit == 4 and overlength == "truncate_prompt":  # the last row's answer alone is longer
        assert rows_of(report, "dropped") == [8] and 7 in rows_of(report, "truncated")


def test_tokens_are_those_of_the_encoder(data: str, tiny_model: pathlib.Path, capsys: Any) -> None:
    tokenizer = models.load_tokenizer(str(tiny_model))
    good = [item for item in formats.Table(data, formats.Reading()) if hasattr(item, "messages")]
    rows = [made for (made,) in check.encoding.Encoder(tokenizer).encode(good)]
    report = found(capsys, data, f"--tokenizer={tiny_model}", code=1)
    statistics = report["statistics"]
    assert statistics["tokens"]["total"] == sum(len(row.tokens) for row in rows)
    assert statistics["trained_tokens"]["total"] == sum(int(row.trained.sum()) for row in rows)
    assert statistics["histogram"]["of"] == "tokens"
    assert rows_of(report, "control_token") == [7]
    (finding,) = [f for f in report["findings"] if f["kind"] == "control_token"]
    assert finding["details"] == {"tokens": {"<|im_end|>": 1}}
    assert finding["severity"] == "warning"


def test_a_tokenizer_is_had_without_weights(
    data: str, tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    import huggingface_hub

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    whole = found(capsys, data, f"--tokenizer={tiny_model}", code=1)
    without = found(capsys, data, f"--tokenizer={bare}", code=1)
    assert whole["statistics"].pop("tokenizer") != without["statistics"].pop("tokenizer")
    assert whole == without
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.extend(allow_patterns)
        return str(bare)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert found(capsys, data, "--tokenizer=owner/name", code=1)["findings"] == whole["findings"]
    assert "tokenizer*" in asked and not any("safetensors" in pattern for pattern in asked)


def test_a_template_that_refuses(
    data: str, tiny_model: pathlib.Path, tmp_path: Any, capsys: Any
) -> None:
    picky = tmp_path / "picky.jinja"
    tokenizer = models.load_tokenizer(str(tiny_model))
    refuse = "{% if 'two' in messages[-1].content or 'two' in messages[0].content %}{{ raise_exception('no two') }}{% endif %}"
    picky.write_text(refuse + tokenizer.chat_template)
    report = found(capsys, data, f"--tokenizer={tiny_model}", f"--chat_template={picky}", code=1)
    (finding,) = [f for f in report["findings"] if f["kind"] == "template"]
    assert (
        finding["rows"] == [2] and finding["severity"] == "error" and "no two" in finding["message"]
    )
    assert report["rows"] == report["trained_rows"] + left_out(report)


def test_a_conversation_of_several_rows_loses_those_that_are_too_long(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    thinking = tmp_path / "thinking.jinja"  # as Qwen3's, it marks the last turn only
    thinking.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(think)"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n(think){% endif %}"
    )
    turns = [("user", "one?"), ("assistant", "red"), ("user", "two? " * 20), ("assistant", "blue")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = write(tmp_path / "turns.jsonl", [row])
    flags = (path, f"--tokenizer={tiny_model}", f"--chat_template={thinking}", "--max_length=60")
    shown = found(capsys, *flags, "--show=1", code=1)
    assert [len(part) > 61 for part in shown["shown"][0]["tokens"]] == [False, True]
    assert rows_of(shown, "dropped") == [1] and shown["trained_rows"] == 0
    dropped = found(capsys, *flags, "--overlength=drop")
    assert rows_of(dropped, "truncated") == [1] and dropped["trained_rows"] == 1


def test_a_template_that_never_works_is_a_finding(
    data: str, tiny_model: pathlib.Path, capsys: Any
) -> None:
    report = found(capsys, data, f"--tokenizer={tiny_model}", "--chat_template={{ 1 }}", code=1)
    assert report["trained_rows"] == 0 and len(rows_of(report, "template")) == 6
    assert report["rows"] == left_out(report)


def test_several_files_and_a_held_out_one(tmp_path: pathlib.Path, capsys: Any) -> None:
    a = write(tmp_path / "a.jsonl", ROWS[:2])
    b = write(tmp_path / "b.jsonl", [ROWS[3], ROWS[0]])
    report = found(capsys, a, b, code=1)
    assert report["files"] == [a, b] and report["rows"] == 4
    assert rows_of(report, "malformed") == [f"{b}:1"]
    assert any(f"{b}:2" in row for row in rows_of(report, "duplicate"))
    leaks = found(capsys, a, f"--valid={b}", code=1)
    assert leaks["rows"] == 2 == leaks["trained_rows"]
    assert rows_of(leaks, "leak")
    assert found(capsys, a)["findings"] == [] or not rows_of(found(capsys, a), "leak")


def test_columns_are_named_by_flags(tmp_path: pathlib.Path, capsys: Any) -> None:
    path = tmp_path / "table.csv"
    path.write_text('left,right,id\nhow are you?,well,7\n"who\nare you?",me,8\n', encoding="utf-8")
    assert "--columns.prompt=NAME" in refusal(capsys, str(path))
    report = found(capsys, str(path), "--columns.prompt=left", "--columns.response=right")
    assert report["rows"] == report["trained_rows"] == 2
    assert report["unused_columns"] == ["id"]
    path.write_text("how are you?,well\nwho are you?,me\n", encoding="utf-8")
    by_place = ("--header=false", "--columns.prompt=0", "--columns.response=1")
    assert found(capsys, str(path), *by_place)["rows"] == 2
    text = write(tmp_path / "text.jsonl", [{"text": "Q: one?\nA: red"}])
    assert found(capsys, text, "--separator=\nA: ")["statistics"]["answer_words"]["total"] == 1


def test_exit_code_is_0_without_errors(tmp_path: pathlib.Path, capsys: Any) -> None:
    clean = write(tmp_path / "clean.jsonl", ROWS[:2])
    assert found(capsys, clean)["rows"] == 2
    twice = write(tmp_path / "twice.jsonl", [ROWS[0], ROWS[0], ROWS[1]])
    report = found(capsys, twice)
    assert rows_of(report, "duplicate") and report["trained_rows"] == 3


def test_a_configuration_is_checked_as_it_is_trained(
    data: str, tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    file = tmp_path / "config.py"
    file.write_text(
        "from jft import config\n\ndef get_config(arg=''):\n    c = config.base()\n"
        f"    c.model.path = {str(tiny_model)!r}\n    c.data.max_length = 60\n    return c\n"
    )
    by_config = found(capsys, f"--config={file}", f"--config.data.train={data}", code=1)
    by_flags = found(capsys, data, f"--tokenizer={tiny_model}", "--max_length=60", code=1)
    for report, prefix in ((by_config, "data."), (by_flags, "--")):
        (advice,) = [f.pop("advice") for f in report["findings"] if f["kind"] == "dropped"]
        assert f"raise {prefix}max_length" in advice
    assert by_config == by_flags and rows_of(by_config, "dropped") == [6]
    two = write(tmp_path / "two.jsonl", ROWS[:2])
    several = found(capsys, f"--config={file}", f"--config.data.train={data}, {two}", code=1)
    assert several["rows"] == len(ROWS) + 2
    assert "--config.data.train" in refusal(capsys, f"--config={file}", data)
    assert "data.train is not set" in refusal(capsys, f"--config={file}")
    assert "--config.data.max_length" in refusal(capsys, f"--config={file}", "--max_length=3")


def test_a_model_tells_which_answers_do_not_belong(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    rows = [{"prompt": f"number {i}?", "response": f"red {i}"} for i in range(30)]
    path, wrong = write(tmp_path / "a.jsonl", [*rows[:20], {"prompt": "", "response": "x"}]), 7

    def losses(model: Any, chosen: Any, progress: Any) -> Any:
        gains = [-1.0 if answer.place[1] == wrong else 1.0 + i for i, answer in enumerate(chosen)]
        return np.array(gains) + 2, np.full(len(chosen), 2.0)

    untold = found(capsys, path, f"--model={tiny_model}", code=1)  # random weights know nothing
    assert untold["statistics"]["outliers"]["looked_at"] == 20
    monkeypatch.setattr(outliers, "losses", losses)
    report = found(capsys, path, f"--model={tiny_model}", code=1)
    assert rows_of(report, "outlier") == [wrong] and rows_of(untold, "outlier") == []
    (finding,) = [f for f in report["findings"] if f["kind"] == "outlier"]
    assert finding["severity"] == "warning"
    assert finding["details"]["worst_first"] == [
        {"path": path, "row": 7, "loss": 2.0, "gain": -1.0}
    ]
    assert report["rows"] == report["trained_rows"] + left_out(report)
    del report["statistics"]["outliers"]
    assert (
        report["statistics"]
        == found(capsys, path, f"--tokenizer={tiny_model}", code=1)["statistics"]
    )
    none = found(capsys, path, f"--model={tiny_model}", "--outliers=0", code=1)
    assert "outliers" not in none["statistics"] and not rows_of(none, "outlier")
    few = found(capsys, path, f"--model={tiny_model}", "--outliers=3", code=1)
    assert few["statistics"]["outliers"] == {"looked_at": 3, "answers": 20}


def test_tokens_that_the_model_has_no_embedding_of(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    known = models.load(str(tiny_model)).config.vocab_size
    larger = tmp_path / "larger"
    shutil.copytree(tiny_model, larger)
    tokenizer = models.load_tokenizer(str(larger))
    tokenizer.add_tokens(["zebra"])
    assert len(tokenizer) == known + 1
    tokenizer.save_pretrained(larger)
    rows = [{"prompt": f"{i}?", "response": "zebra" if i == 3 else "red"} for i in range(25)]
    path = write(tmp_path / "a.jsonl", rows)
    assert rows_of(found(capsys, path, f"--tokenizer={larger}"), "template") == []
    report = found(capsys, path, f"--model={larger}", code=1)
    assert rows_of(report, "template") == [4] and report["trained_rows"] == 24
    assert report["statistics"]["outliers"]["looked_at"] == 24


REFUSED = {
    "name a file": (),
    "--show needs --tokenizer": ("DATA", "--show=1"),
    "--rows needs --tokenizer": ("DATA", "--rows=1"),
    "--max_length needs --tokenizer": ("DATA", "--max_length=1"),
    "--overlength=cut: one of error, drop": ("DATA", "MODEL", "--overlength=cut"),
    "--rows=1,x: numbers of rows": ("DATA", "MODEL", "--rows=1,x"),
    "--rows=99: there is no such row among the 8": ("DATA", "MODEL", "--rows=99"),
    "--show=-1: it must be 0 or more": ("DATA", "MODEL", "--show=-1"),
    "--max_length=-1: it must be 0 or more": ("DATA", "MODEL", "--max_length=-1"),
    "give --tokenizer or --model": ("DATA", "MODEL", "--model=x"),
    "--outliers needs --model": ("DATA", "MODEL", "--outliers=3"),
    "--header=maybe: true or false": ("DATA", "--header=maybe"),
    "absent.jsonl: no such file": ("absent.jsonl",),
    "absent: no such": ("DATA", "--tokenizer=./absent"),
    "unrecognized arguments: --colums.prompt=x": ("DATA", "--colums.prompt=x"),
    "--columns.prompt=x": ("DATA", "--columns.prompt=x"),
    "--fix=x.jsonl: takes one file at a time, not 2": ("DATA", "DATA", "--fix=x.jsonl"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_flags_that_mean_nothing_are_refused_in_one_line(
    said: str, data: str, tiny_model: pathlib.Path, capsys: Any
) -> None:
    places = {"DATA": data, "MODEL": f"--tokenizer={tiny_model}"}
    assert said in refusal(capsys, *(places.get(word, word) for word in REFUSED[said]))


def test_fix_writes_and_tells(tmp_path: pathlib.Path, capsys: Any) -> None:
    path, out = write(tmp_path / "a.jsonl", [*ROWS[:2], ROWS[0]]), tmp_path / "fixed.jsonl"
    report = found(capsys, path, f"--fix={out}")
    assert report["rows"] == 3 and report["fixed"]


# ---- the report


def test_the_report_fits_80_columns_and_tells_all(data: str, tiny_model: Any, capsys: Any) -> None:
    printed = jft(capsys, data, f"--tokenizer={tiny_model}", "--max_length=60", code=1)
    report = found(capsys, data, f"--tokenizer={tiny_model}", "--max_length=60", code=1)
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "\x1b" not in printed and "\u202e" not in printed
    joined = " ".join(printed.split())
    assert f"{data}: 8 rows" in joined.replace("- ", "-")
    for finding in report["findings"]:
        assert finding["kind"] in printed
        assert finding["message"].split()[0] in printed
    total = {s: sum(f["severity"] == s for f in report["findings"]) for s in ("error", "warning")}
    assert f"{total['error']} error" in printed.splitlines()[-1]
    assert printed.splitlines()[-1].endswith(
        f"{report['trained_rows']} of 8 rows would be trained on"
    )
    assert "say <|im_end|> now → no" in printed
    assert printed.index("Errors") < printed.index("Warnings")


def test_markup_in_data_is_printed_as_it_stands(tmp_path: pathlib.Path, capsys: Any) -> None:
    odd = {"prompt": "[bold]\x1b[31mred[/bold] \u202e[link=x]", "response": "[/] :smile:"}
    printed = jft(capsys, write(tmp_path / "odd.jsonl", [odd, odd]))
    assert "[bold]<1B>[31mred[/bold] <U+202E>[link=x] → [/] :smile:" in printed


def test_secrets_are_not_quoted() -> None:
    place = ("a.jsonl", 1)
    finding = check.findings.Finding("secret", "warning", 1, (place,), "1 row", "look")
    other = check.findings.Finding("duplicate", "warning", 1, (place,), "1 row", "look")
    asked = check.Asked(("absent.jsonl",), formats.Reading())
    assert check.quotes(asked, [finding, other]) == {}  # without opening the file


def test_a_reader_that_goes_away_is_no_error(data: str, monkeypatch: Any) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        from jft.verbs import check as verb

        with pytest.raises(BrokenPipeError):  # which `cli.main` takes for the end of the output
            verb.run([data])
            gone.flush()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def test_standard_output_holds_the_report_alone(data: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["check", data, "--json"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 and captured.err == ""
    assert sys.stdout is not None


# ---- lengths


def test_quantiles_and_bins() -> None:
    values = lengths.Lengths()
    for value in (*range(1, 101), 5000):
        values.add(value)
    assert values.describe() == {"min": 1, "median": 51, "p95": 96, "max": 5000, "total": 10050}
    bins = values.bins(limit=70)
    assert sum(entry["rows"] for entry in bins) == 101 and len(bins) <= 15
    assert bins[0]["from"] == 1 and bins[-1]["to"] == 5000
    assert all(a["to"] + 1 == b["from"] for a, b in zip(bins, bins[1:], strict=False))
    assert sum(entry["rows"] for entry in bins if entry["from"] > 70) == 31
    for entry in bins:
        assert entry["rows"] == sum(
            entry["from"] <= v <= entry["to"] for v in (*range(1, 101), 5000)
        )
    assert lengths.Lengths().describe() == {} and lengths.Lengths().bins() == []
