# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face Hub by name: owner/name, name:split, owner/name:subset:split."""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jft import errors
from jft.data import arrow_rows, examples, files, records

_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?::[\w.-]+)?(?::[\w.-]+)?")


def is_name(source: str) -> bool:
    """Whether a source is a Hub name: what lies on disk, or ends as a data file does, is none."""
    if not _NAME.fullmatch(source) or not ("/" in source or ":" in source):
        return False
    if source.startswith(".") or files.kind(source) or pathlib.Path(source).exists():
        return False
    # datasets would read a folder of that name here, by its own rules.
    name = source.split(":")[0]
    return not pathlib.Path(name).exists() and not pathlib.Path(name.split("/")[0]).is_dir()


def stream(source: str) -> Iterator[records.Record | examples.Fault]:
    """The rows of a data set's split.

    Raises:
        errors.UserError: it can't be had, or has several splits or subsets and none is named.
    """
    batches = load(source).with_format("arrow").iter(batch_size=arrow_rows.BATCH)
    return arrow_rows.rows_of(source, batches)


def version(source: str) -> str:
    """What changes when the set does: the files that the library keeps of it, whose names tell the commit."""
    loaded = load(source)
    return " ".join([source, str(len(loaded)), *(file["filename"] for file in loaded.cache_files)])


@functools.lru_cache(maxsize=4)
def load(source: str) -> Any:
    """The `datasets.Dataset` that a name stands for, kept for the next time that it is asked for."""
    try:
        import datasets
    except ImportError:
        raise errors.UserError(
            f"{source}: Hub data sets need the package datasets: pip install datasets; "
            "or name a file"
        ) from None
    name, *others = source.split(":")
    subset, split = (others[0] if len(others) > 1 else None), (others[-1] if others else None)
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever a loader, the network or a file in the set comes to
        _tell(source, error)
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            splits = [str(name) for name in loaded] or ["no split"]
            told = f"has the splits {', '.join(splits)}; name one, as {name}:{splits[0]}"
            raise errors.UserError(f"{source}: {told}")
        loaded = next(iter(loaded.values()))
    if not len(loaded):
        raise errors.UserError(f"{source}: holds no rows; name another split")
    return loaded


def _tell(source: str, error: Exception) -> NoReturn:
    """Raises what is wrong as one line with what to do."""
    text = records.one_line(error)
    if "Unknown split" in text or "should be one of" in text.lower():
        advice = "name one of these splits"
    elif "Config name is missing" in text or "BuilderConfig" in text:
        advice = f"name a subset, as {source.split(':')[0]}:SUBSET:SPLIT"
    elif "gated" in text:
        advice = "ask for access on its page, then log in with `hf auth login`"
    elif isinstance(error, ConnectionError) or "offline" in text.lower():
        advice = "check the network; a file is named with its extension"
    elif "scripts are no longer supported" in text or "trust_remote_code" in text:
        advice = "it needs code of its own, which is not run; save its rows to a file and name that"
    else:
        advice = "check the name; a file is named with its extension"
    raise errors.UserError(f"{source}: no data set from the Hub: {text}; {advice}") from None
