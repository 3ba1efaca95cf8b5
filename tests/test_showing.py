# SPDX-License-Identifier: Apache-2.0
"""Rows token by token: nothing of them missing, the marks those of the encoder, and no character that a terminal obeys."""

import io
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from rich import console as rich_console

from jft import cli, models
from jft.data import encoding, examples, rows
from jft.terminal import pieces, showing, visible

PROMPT = "one?\n[bold]two[/bold] <|im_end|> \x1b[31m  three\t日本 🦜\n\n"
ANSWER = " red\ngreen  \n"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # those that rich makes


@pytest.fixture(scope="module")
def tokenizer(tiny_model: pathlib.Path) -> Any:
    return models.load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def row(tokenizer: Any) -> rows.Row:
    example = examples.Example(examples.pair(PROMPT, ANSWER), "a.jsonl:row 1", "a.jsonl", 1)
    ((made,),) = encoding.Encoder(tokenizer).encode([example])
    return made


def printed(row: rows.Row, tokenizer: Any, width: int = 60, **options: Any) -> str:
    console = rich_console.Console(file=io.StringIO(), width=width, **options)
    shown = showing.Shown("a.jsonl", 1, (row,))
    showing.print_shown(console, shown, pieces.Pieces(tokenizer))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tokens_spell_the_text(row: rows.Row, tokenizer: Any) -> None:
    found = showing.tokens(row, pieces.Pieces(tokenizer))
    assert [token.id for token in found] == row.tokens.tolist()
    assert [token.trained for token in found] == [False, *row.trained[1:].tolist()]
    whole = tokenizer.decode(row.tokens, skip_special_tokens=False)
    spelled = "".join(token.text for token in found)
    # Bytes of characters that several tokens share are shown as such.
    assert _joined(spelled) == whole
    controls = {token.text for token in found if token.control}
    assert controls == {"<|im_start|>", "<|im_end|>"}
    assert sum(token.text == "<|im_end|>" for token in found) == 2  # not the one in the prompt
    assert found[-1].text == "<|im_end|>" and found[-1].trained and found[-1].control


def _terminal(width: int) -> Any:
    return rich_console.Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor"
    )


def _joined(spelled: str) -> str:
    """<E6><97><A5> as the character."""
    runs = r"(?:<(?:[0-9A-F]{2} ?)+>)+"
    return re.sub(runs, lambda m: bytes.fromhex(re.sub("[<> ]", "", m[0])).decode(), spelled)


def test_plain_output_marks_what_is_trained(row: rows.Row, tokenizer: Any) -> None:
    text = printed(row, tokenizer)
    assert "\x1b" not in text and all(len(line) <= 60 for line in text.splitlines())
    title, *body = text.rstrip("\n").splitlines()
    trained = int(row.trained.sum())
    assert title == f"row 1  {len(row.tokens)} tokens, {trained} trained"
    found = showing.tokens(row, pieces.Pieces(tokenizer))
    expected = "".join(f"[{_plain(token)}]" for token in found if token.trained)
    assert "".join(body).endswith(expected) and expected.endswith("[«<|im_end|>»]")
    # Context has one bar between two ordinary tokens, and no bracket that the data does not have.
    context = "".join(body).removesuffix(expected)
    assert context.count("[") == sum("[" in t.text for t in found if not t.trained)


def _plain(token: showing.Token) -> str:
    text = visible.escape(token.text.replace(" ", "·") if token.text.strip() == "" else token.text)
    text = re.sub(r"^ +| +$", lambda m: "·" * len(m[0]), text)
    return f"«{text}»" if token.control else text


@pytest.mark.parametrize("width", [20, 37, 80])
def test_colours_tell_the_same_and_shades_alternate(
    width: int, row: rows.Row, tokenizer: Any
) -> None:
    text = printed(row, tokenizer, width, force_terminal=True, color_system="truecolor")
    plain = ESCAPES.sub("", text)
    assert "\x1b" not in plain and all(_width(line) <= width for line in plain.splitlines()[1:])
    found = showing.tokens(row, pieces.Pieces(tokenizer))
    lines = list(showing.lines(found, width, showing.palette(_terminal(80))))
    styles = [
        (str(span.style), line.plain[span.start : span.end])
        for line in lines
        for span in line.spans
    ]
    styles += [(str(line.style), line.plain) for line in lines if not line.spans]
    green = "".join(part for style, part in styles if "#1b5e20" in style or "#2e7d32" in style)
    assert green == "".join(_plain(t).strip("«»") for t in found if t.trained)
    yellow = "".join(part for style, part in styles if "#ffd75f" in style)
    assert yellow == "".join(token.text for token in found if token.control)
    shades = [style.split(" on ")[1] for style, _ in styles]
    assert len(set(shades)) == 4


def _width(line: str) -> int:
    from rich import cells

    return cells.cell_len(line)


@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_four_backgrounds_are_four_on_every_terminal(system: Any) -> None:
    console = rich_console.Console(file=io.StringIO(), force_terminal=True, color_system=system)
    colours = showing.palette(console)
    assert colours is not None
    for control in (False, True):
        seen = set()
        for trained, place in itertools.product((False, True), (0, 1)):
            style = colours.style(showing.Token(0, "x", trained, control), place)
            console.print("x", style=style)
            seen.add(console.file.getvalue().splitlines()[-1])  # type: ignore[attr-defined]
        assert len(seen) == 4
    plain = rich_console.Console(file=io.StringIO(), force_terminal=True, no_color=True)
    assert showing.palette(plain) is None


def test_neighbours_differ_in_shade(tokenizer: Any) -> None:
    made = rows.Row(np.array([70, 71, 72, 73], np.int32), np.array([False] * 4), "x")
    (line,) = showing.lines(
        showing.tokens(made, pieces.Pieces(tokenizer)), 80, showing.palette(_terminal(80))
    )
    styles = [str(span.style) for span in line.spans]
    assert len(styles) == 4 and all(a != b for a, b in itertools.pairwise(styles))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a⏎b→c"),
        ("\x1b]0;title\x07", "<1B>]0;title<07>"),
        ("\x9b31m", "<9B>31m"),
        ("\r\x00\x7f", "<0D><00><7F>"),
        ("a\u202eb\u2028c\u200bd\ufeff", "a<U+202E>b<U+2028>c<U+200B>d<U+FEFF>"),
        ("\ud800", "<U+D800>"),
        ("日本 👩‍🚀 é [b]", "日本 👩‍🚀 é [b]"),
    ],
)
def test_nothing_in_text_is_obeyed(text: str, shown: str) -> None:
    assert visible.escape(text) == shown


@pytest.mark.parametrize("width", range(5, 30, 4))
def test_excerpts_fit(width: int) -> None:
    assert visible.excerpt("one  two\n three", 80) == "one two three"
    for text in ("abc " * 50, "日本" * 50, "\x1b" * 30):
        short = visible.excerpt(text, width)
        assert _width(short) <= width and short.endswith("…")


def test_show_prints_rows_and_then_the_report(
    tokenizer: Any,
    row: rows.Row,
    tiny_model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("a.jsonl")  # short, so that the line that names it is not broken
    lines = [{"prompt": PROMPT, "response": ANSWER}, {"prompt": 1, "response": "x"}]
    lines += [{"prompt": f"{i}?", "response": "blue"} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["check", str(path), f"--tokenizer={tiny_model}"]
    assert cli.main([*flags, "--show=2"]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text and f"row 1  {len(row.tokens)} tokens" in text
    assert "row 2  not trained on: " in text and "row 3  " not in text
    assert text.startswith("[trained]") and text.index("row 1  ") < text.index(f"{path}: 5 rows")
    assert cli.main([*flags, "--rows=5,1", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)["shown"]
    assert [entry["row"] for entry in shown] == [1, 5]
    assert [token["id"] for token in shown[0]["tokens"]] == row.tokens.tolist()
    assert [token["trained"] for token in shown[0]["tokens"]][1:] == row.trained[1:].tolist()
    assert cli.main([*flags, "--show=2", "--json"]) == 1
    faulty = json.loads(capsys.readouterr().out)["shown"][1]
    assert faulty["row"] == 2 and "fault" in faulty and "tokens" not in faulty
