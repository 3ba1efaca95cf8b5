# SPDX-License-Identifier: Apache-2.0
"""Files of a model's folder: they must be files, and must be in it."""

import os
import pathlib
from typing import Any

from jft import errors, json_text


def has(folder: pathlib.Path, name: str) -> bool:
    """Whether there is such an entry, be it a link to nowhere."""
    return os.path.lexists(folder / name)


def file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the folder. A link must stay inside, or lead to the blobs of a Hub cache that the folder is in.

    Raises:
      errors.UserError: it leads elsewhere, or is no file.
    """
    path = folder / name
    home, real = (pathlib.Path(os.path.realpath(x)) for x in (folder, path))
    blobs = [x.parents[1] / "blobs" for x in (home, *home.parents) if x.parent.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *blobs)):
        raise errors.UserError(
            f"{path} is a link to {real}, outside its folder; put the file there"
        )
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "is no file that can be read"
        raise errors.UserError(f"{path}: {what}")
    return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file's JSON object."""
    parsed = json_text.read(path)
    if not isinstance(parsed, dict):
        raise errors.UserError(f"{path}: a JSON object is expected, not {type(parsed).__name__}")
    return parsed


def hint(folder: pathlib.Path) -> str:
    """What a folder without a model in safetensors holds instead."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return " (there is no such folder)"
    except OSError as error:
        return f" ({error.strerror or error})"
    if "adapter_config.json" in names:
        return " (this is an adapter's folder; give the base model's)"
    for suffix, advice in (
        (".gguf", "give that file's path"),
        (".bin", "pickled files are never read; convert them to safetensors"),
        (".pth", "pickled files are never read; convert them to safetensors"),
        (".safetensors", "not a name that is looked for"),
    ):
        held = [name for name in names if name.endswith(suffix)]
        if held:
            return f" (there is {held[0]}: {advice})"
    return ""
