# SPDX-License-Identifier: Apache-2.0
"""A model folder's tokenizer: without network, without running code from the folder, and not for more than its files.

A tokenizer.json is a program too: rules that replace a letter by two, forty times over, make 2**40 of one. How much its
rules can make of a text is bounded before it is loaded. Its regular expressions end by the library's own limit, which
is a panic in Rust: no Exception, and told here as a line like others.
"""

import base64
import os
import pathlib
from typing import Any

from jft import errors, json_text
from jft.models import folders

_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_GROWTH = 64  # times that rules may lengthen a text; NFKC makes 18 characters of one
_TRIAL = "The user's 1,234 caf\u00e9s\n\n\t\u6f22\u5b57 \U0001f600"


def load(folder: str | pathlib.Path) -> Any:
    """The folder's tokenizer.

    Raises:
      errors.UserError: there is none, it is damaged, needs code of its own, or would make too much of a text.
    """
    import transformers

    folder = pathlib.Path(folder)
    written = _checked(folder)
    if written is None and not (folder / "tokenizer_config.json").is_file():
        raise errors.UserError(f"{folder}: no tokenizer.json and no tokenizer_config.json")
    options = {"trust_remote_code": False, "local_files_only": True}
    with errors.from_library(f"{folder}: the tokenizer can't be loaded"):
        found = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        if written is not None and not _as_written(found, written):
            found = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
        found(_TRIAL)
    return found


def _checked(folder: pathlib.Path) -> Any:
    """What tokenizer.json says, None where there is none; links are followed inside the folder only."""
    if folder.is_dir():
        for entry in sorted(os.listdir(folder)):
            if entry.endswith(_FILES) and (folder / entry).is_symlink():
                folders.file(folder, entry)
    for entry in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / entry).is_file():
            folders.read_json(folder / entry)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    written = folders.read_json(path)
    for part in ("normalizer", "decoder"):
        if _growth(written.get(part)) > _GROWTH:
            raise errors.UserError(
                f"{path}: the rules of its {part} may make more than {_GROWTH} characters of one"
            )
    return written


def _growth(rules: Any) -> float:
    """How much longer a text may become, at most."""
    if not isinstance(rules, dict):
        return 1.0
    inner = rules.get("normalizers") or rules.get("decoders")
    if isinstance(inner, list):
        total = 1.0
        for rule in inner:
            total = min(total * _growth(rule), 1e9)
        return total
    match rules.get("type"):
        case "Replace":
            return _replaced(rules.get("pattern"), rules.get("content"))
        case "Precompiled":
            return _longest(rules.get("precompiled_charsmap"))
        case "NFKC" | "NFKD":
            return 18.0
    return 1.0


def _replaced(pattern: Any, content: Any) -> float:
    long = len(content) if isinstance(content, str) else 1
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, long / len(text))
    return 1.0 + long  # an expression may match nothing, beside every character


def _longest(charsmap: Any) -> float:
    """Of what sentencepiece's table puts in a character's place: it ends with these texts, each closed by a 0."""
    try:
        table = base64.b64decode(charsmap)
    except (TypeError, ValueError):
        return 1.0  # the library will refuse it
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(map(len, texts.split(b"\0"))))


def _as_written(found: Any, written: Any) -> bool:
    """Whether a tokenizer cuts text as tokenizer.json says.

    transformers 5 builds some classes anew from the vocabulary: GPT2Tokenizer, which SmolLM2 names,
    drops the rule that splits digits one by one, and every number gets other ids than in training.
    """
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        return False
    got = json_text.loads(backend.to_str(), "the tokenizer:")
    return all(got.get(part) == written.get(part) for part in ("normalizer", "pre_tokenizer"))
