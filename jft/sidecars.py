# SPDX-License-Identifier: Apache-2.0
"""The form of jft.json beside an adapter, which may be a stranger's."""

import pathlib
from typing import Any

from jft import errors, json_text

_TEXTS = (
    "kind base revision dtype fingerprint system chat_template template_sha256 tokenizer_sha256"
).split()


def read(path: pathlib.Path) -> dict[str, Any]:
    """What it says.

    Raises:
      UserError: it can't be read, or a key is not as jft writes it.
    """
    record = json_text.read(path)
    if not isinstance(record, dict):
        raise errors.UserError(f"{path}: not as jft writes it: no JSON object")
    forms = dict.fromkeys(_TEXTS, str) | {"step": int, "scores": dict, "training": dict}
    for key, form in forms.items():
        if type(record.get(key)) is not form:
            said = json_text.shown(record[key]) if key in record else "missing"
            raise errors.UserError(f"{path}: not as jft writes it: {key} is {said}")
    files = record.get("files", {})  # results of earlier releases have none
    if not isinstance(files, dict) or not all(isinstance(x, str) for x in files.values()):
        raise errors.UserError(f"{path}: not as jft writes it: files is no object of texts")
    for key in sorted(record.keys() - forms.keys() - {"files"}):
        raise errors.UserError(f"{path}: not as jft writes it: it has {json_text.shown(key)}")
    model = record["training"].get("model", {})
    if not isinstance(model, dict):
        raise errors.UserError(f"{path}: not as jft writes it: training.model is no object")
    return record
