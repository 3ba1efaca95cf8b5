# SPDX-License-Identifier: Apache-2.0
"""Each source tokenised once: kept in the cache under a fingerprint of all that its rows depend on.

A file's contents are hashed once for each path, size and time of change; what the contents, the tokenizer, the template
and the options give is found under their hash, wherever the file lies.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import tqdm

from jft import errors
from jft.data import encoding, examples, files, formats, hub, readers, store, workers
from jft.models import resolve

VERSION = 1  # of what is stored; another one when the same input gives other rows
CHUNK = 500  # examples encoded together
# A file that changed this many seconds ago may change once more without a new time of change.
SETTLED = 2.0
UNUSED = 30 * 24 * 3600.0  # seconds after which what was not used goes


def tokenised(
    source: str, reading: formats.Reading, encoder: encoding.Encoder, settings: dict[str, Any]
) -> store.Stored:
    """The rows of a source, from the cache or made now.

    Args:
        source: files, a folder or a Hub dataset, as `formats.Table` takes.
        reading: how it is understood.
        encoder: of the model.
        settings: all that the encoder's result depends on beside its tokenizer.

    Raises:
        errors.UserError: it can't be read, or some of its rows can't be used.
    """
    what = {
        "version": VERSION,
        "source": fingerprint(source),
        "reading": [dict(reading.columns), reading.header, reading.separator],
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "template": encoder.tokenizer.chat_template,
        "libraries": _libraries(),
        **settings,
    }
    folder = cache_folder() / hash_of(what)
    if not (folder / "meta.json").is_file():
        prune()
        _make(folder, formats.Table(source, reading), encoder)
    os.utime(folder)
    return store.Stored(folder, readers.files(source))


def cache_folder() -> pathlib.Path:
    return resolve.cache_folder() / "data"


def prune() -> None:
    """Takes away what was not used for long."""
    root = cache_folder()
    for entry in root.iterdir() if root.is_dir() else ():
        try:
            if time.time() - entry.stat().st_mtime < UNUSED or entry.name == "digests":
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError:  # another process was first
            continue


def hash_of(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _make(folder: pathlib.Path, table: formats.Table, encoder: encoding.Encoder) -> None:
    encoder.counts = encoding.Counts()
    read, faults = 0, []
    items = iter(table)
    chunks = iter(lambda: list(itertools.islice(items, CHUNK)), [])
    made = contextlib.closing(workers.encoded(encoder, chunks))
    with store.Writer(folder, table.files) as writer, _progress(table) as bar, made as encoded:
        for some, found in encoded:
            read += len(some)
            bar.update(len(some))
            faults += [item for item in (*some, *found) if isinstance(item, examples.Fault)]
            if not faults:  # else the rest is only counted
                writer.add(some, found)
        if faults:
            raise errors.UserError(_told(faults, read))
        if not writer.examples:
            raise errors.UserError(f"{', '.join(table.files)}: holds no rows")
        shape = table.shape
        assert shape is not None
        writer.finish(
            {
                "shape": shape.kind,
                "description": shape.describe(),
                "unused_columns": list(table.extra),
                "untrained_turns": encoder.counts.untrained_turns,
                "turns": encoder.counts.turns,
                "expanded": encoder.counts.expanded,
            }
        )


def _told(faults: list[examples.Fault], read: int) -> str:
    first = faults[0].message
    if len(faults) == 1:
        return first
    return f"{first} (the first of {len(faults)} such rows of {read}: `jft check` lists them, and --fix leaves them out)"


def _progress(table: formats.Table) -> Any:
    name = table.files[0] if len(table.files) == 1 else f"{len(table.files)} files"
    return tqdm.tqdm(
        desc=f"tokenising {name}", unit="row", file=sys.stderr, delay=3, mininterval=1, leave=False
    )


def fingerprint(source: str) -> str:
    """A hash of the contents of a source's files, in their order."""
    if hub.is_name(source):
        return hash_of(hub.version(source))
    return hash_of([_digest(pathlib.Path(file)) for file in readers.files(source)])


def _digest(file: pathlib.Path) -> str:
    found = file.stat()
    known = [str(file.resolve()), found.st_size, found.st_mtime_ns]
    kept = cache_folder() / "digests" / hash_of(known)
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    digest = f"{digest} {files.kind(str(file))}"
    if time.time() - found.st_mtime > SETTLED:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest, encoding="utf-8")
    return digest


@functools.lru_cache(maxsize=8)
def tokenizer_hash(tokenizer: Any) -> str:
    """Of the tokenizer itself, without its template."""
    serialised = tokenizer.backend_tokenizer.to_str()
    names = [str(tokenizer.bos_token), str(tokenizer.eos_token)]
    return hashlib.sha256(json.dumps([serialised, names]).encode()).hexdigest()[:32]


def _libraries() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")}
