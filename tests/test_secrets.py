# SPDX-License-Identifier: Apache-2.0
"""Secrets in what a run writes down: the forms, and a run's folder and messages."""

import pathlib

import pytest

from jft import claims, cli, config, runs, secrets

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ2bC4dE6f"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"--token={TOKEN}", "--token=[secret]"),
        (f"a {TOKEN} b", "a [secret] b"),
        ("https://me:hunter22@host/x.jsonl", "https://[secret]@host/x.jsonl"),
        (
            "https://storage/b/o.jsonl?X-Goog-Signature=0a1b2c3d4e&alt=media",
            "https://storage/b/o.jsonl?X-Goog-Signature=[secret]&alt=media",
        ),
        ("AKIAIOSFODNN7ABCDEFG", "[secret]"),
        ("--config.optim.learning_rate=1e-4", "--config.optim.learning_rate=1e-4"),
        ("https://host/a:b@c", "https://host/a:b@c"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, wanted: str) -> None:
    assert secrets.redacted(text) == wanted
    assert secrets.redacted({"a": [text, 1, None]}) == {"a": [wanted, 1, None]}


def test_a_run_s_folder_holds_none_and_the_run_still_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config.base()
    c.data.train = f"https://me:{TOKEN}@host/rows.jsonl"
    monkeypatch.setattr("sys.argv", ["jft", "train", f"--config.data.train={c.data.train}"])
    runs.describe(tmp_path, c, {"files": [c.data.train]}, None)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "@host/rows.jsonl" in written and TOKEN not in written
    before = runs.read_json(tmp_path / "config.json")["resolved"]
    assert claims.changes(c.to_dict(), before) == []
    c.data.train = "other.jsonl"
    assert len(claims.changes(c.to_dict(), before)) == 1


def test_messages_hold_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([f"--token={TOKEN}"]) == 2
    said = capsys.readouterr().err
    assert TOKEN not in said and "[secret]" in said
