# SPDX-License-Identifier: Apache-2.0
"""Which files a source names, and their bytes: a file, a compressed one, or a folder of one kind."""

import difflib
import io
import lzma
import pathlib
import re
import zlib
from typing import Any

from jft import errors, json_text
from jft.data import records

# Kind by extension; each may be followed by one of COMPRESSED.
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
COMPRESSED = (".gz", ".bz2", ".xz")
# Text is packed to a tenth. A packed file may unpack to so many bytes, or so many times its size, whichever is more.
UNPACKED, RATIO = 1 << 30, 200
LONGEST = 1 << 27  # bytes of a row
# What reading a damaged file raises; a compressed file that ends early is an EOFError.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)

# Files of a folder that describe the data beside them.
_BESIDE = re.compile(
    r"(^|[^a-z])(readme|notice|licen[cs]es?|copying|changelog|changes|authors|citation|contributing|requirements)([^a-z]|$)"
)
_DESCRIBING = ("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "manifest")
_SPLITS = {
    "train": ("train", "training", "trainset"),
    "valid": ("valid", "validation", "val", "dev", "devset", "validset"),
    "test": ("test", "testset", "testing", "heldout"),
}
# How files begin that are not what their name says, and what to do with them.
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "is UTF-32 text; save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32 text; save it as UTF-8"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)"),
    (b"\x1f\x8b", "is compressed with gzip; give its name the ending .gz"),
    (b"BZh91AY", "is compressed with bzip2; give its name the ending .bz2"),
    (b"\xfd7zXZ", "is compressed with xz; give its name the ending .xz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it (zstd -d FILE)"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (b"PAR1", "is a Parquet file; give its name the ending .parquet"),
    (b"ARROW1", "is an Arrow file; give its name the ending .arrow"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; run `git lfs pull`"),
    (b"<!doctype html", "is a web page, not the data; download the file itself"),
    (b"<html", "is a web page, not the data; download the file itself"),
)
_OWN = {"parquet": b"PAR1", "arrow": b"ARROW1"}


def find(source: str) -> tuple[str, ...]:
    """The data files that a path names.

    Raises:
        errors.UserError: there is no such file, its kind is unknown, or a folder leaves open what is meant.
    """
    path = pathlib.Path(source)
    if any(character < " " for character in source):
        raise errors.UserError(f"{source!r}: no file name: it holds control characters")
    try:
        if path.is_dir():
            return _in_folder(path)
        if not path.exists():
            raise errors.UserError(f"{source}: no such file{_near(path)}")
    except OSError as error:  # no permission, or a name that is too long
        raise errors.UserError(f"{source}: cannot be read: {error.strerror or error}") from None
    if not path.is_file():
        raise errors.UserError(f"{source}: is no regular file; save the data to one")
    if kind(source) is None:
        known = ", ".join(KINDS)
        raise errors.UserError(
            f"{source}: unknown extension {path.suffix!r}; known are {known}, each also with "
            f"{', '.join(COMPRESSED)}"
        )
    return (source,)


def kind(path: str) -> str | None:
    """What a file's name says that it is; None if that is unknown."""
    name = pathlib.Path(path).name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get(pathlib.Path(name).suffix)


def open_bytes(path: str) -> io.BufferedReader:
    """The file's bytes, decompressed.

    Python's own wrappers lose the good bytes before a damaged place when they are asked for more than is
    left; `_Pieces` hands on whatever there is.
    """
    import bz2
    import gzip

    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(
        pathlib.Path(path).suffix.lower()
    )
    if opener is None:
        return open(path, "rb")
    most = max(UNPACKED, RATIO * pathlib.Path(path).stat().st_size)
    return io.BufferedReader(_Pieces(opener(path, "rb"), most), 1 << 17)


class _Bomb(OSError):
    """More was unpacked than a file of data holds."""


class _Pieces(io.RawIOBase):
    def __init__(self, inner: Any, most: int) -> None:
        self._inner, self._left = inner, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _Bomb(
                f"the compressed file unpacks to more than {RATIO} times its size; if that is right, unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def foreign(file: io.BufferedReader, kind: str) -> str:
    """What a file is that its name does not say, with what to do; empty if it looks right."""
    head = file.peek(64)[:64]
    if kind in _OWN and head.startswith(_OWN[kind]):
        return ""
    start = head.lower() if head.lstrip()[:1] == b"<" else head
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            return what
    if kind not in _OWN and len(head) >= 8 and not (any(head[1::2]) and any(head[::2])):
        return "looks like UTF-16 text (every other byte is 0); save it as UTF-8"
    return ""


def damage(error: BaseException) -> str:
    """Why the bytes of a file ended early, in words."""
    if isinstance(error, EOFError):
        return "the compressed file ends early"
    if isinstance(error, _Bomb):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"the file cannot be read: {error.strerror}"
    return f"the file is damaged or not compressed as its name says: {records.one_line(error)}"


def _in_folder(folder: pathlib.Path) -> tuple[str, ...]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise errors.UserError(
            f"{folder}: holds the splits {', '.join(splits)}; name one, as {folder / (splits or ['train'])[0]}"
        )
    if (folder / "state.json").is_file():
        return _saved(folder)
    found = sorted(path for path in folder.iterdir() if path.is_file() and _is_data(path))
    if not found:
        inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())[:5]
        there = f"; its folders are {', '.join(inner)}: name one" if inner else ""
        raise errors.UserError(
            f"{folder}: the folder holds no data file ({', '.join(KINDS)}){there}"
        )
    names = [path.name for path in found]
    if len({kind(name) for name in names}) > 1:
        raise errors.UserError(
            f"{folder}: the folder holds files of several kinds ({_few(names)}); name one file"
        )
    if len({split for name in names if (split := _split(name))}) > 1:
        raise errors.UserError(
            f"{folder}: the folder holds several splits ({_few(names)}); name one file"
        )
    return tuple(str(path) for path in found)


def _saved(folder: pathlib.Path) -> tuple[str, ...]:
    """The files of a folder that datasets' save_to_disk wrote, in its order."""
    try:
        state = json_text.read(folder / "state.json")
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.UserError(
            f"{folder}/state.json: is not as save_to_disk writes it ({records.one_line(error)}); "
            "save the data set again"
        ) from None
    if outside := [name for name in names if pathlib.PurePath(name).name != name or "\\" in name]:
        raise errors.UserError(
            f"{folder}: state.json names {outside[0]!r}, which is no file of the folder; save the data set again"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise errors.UserError(
            f"{folder}: state.json names {len(names)} files, of which {len(missing)} are missing"
            f"{f' ({_few(missing)})' if missing else ''}; save the data set again"
        )
    return tuple(str(folder / name) for name in names)


def _is_data(path: pathlib.Path) -> bool:
    name = path.name.lower()
    stem = name.split(".")[0]
    if name.startswith((".", "_")) or kind(name) is None:
        return False
    if kind(name) == "json" and stem in _DESCRIBING:
        return False
    return not (kind(name) in ("txt", "json") and _BESIDE.search(stem))


def _split(name: str) -> str | None:
    """Which split a file's name speaks of, if any."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, called in _SPLITS.items() if {*called} & {*words}), None)


def _near(file: pathlib.Path) -> str:
    """What the user may have meant, as the end of a sentence."""
    if not file.parent.is_dir():
        return f" (nor a folder {str(file.parent)!r})"
    names = [entry.name for entry in file.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(file.name, names, n=3)
    near = near or sorted(name for name in names if kind(name))[:3]
    return f"; the folder holds {', '.join(near)}" if near else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
