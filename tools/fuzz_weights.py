# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: safetensors files, one or several with an index. What we read, the format's own library reads alike."""

import pathlib
import random
from typing import Any

import fuzz_mutations
import numpy as np

from jft.models import safetensors

WORDS = ("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "I64", "U8", "weight_map")
FILES = ("a.safetensors", "b.safetensors")
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def header(source: random.Random, first: int) -> tuple[dict[str, Any], bytes]:
    """A header as it should be, and the tensors' bytes."""
    found: dict[str, Any] = {}
    if source.random() < 0.5:
        found["__metadata__"] = {"format": "pt"}
    end = 0
    for i in range(first, first + source.randint(0, 4)):
        shape = [source.randint(0, 4) for _ in range(source.randint(0, 3))]
        dtype = source.choice(list(SIZES))
        start, end = end, end + int(np.prod(shape)) * SIZES[dtype]
        found[f"layer.{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return found, source.randbytes(end)


def joined(source: random.Random, head: Any, body: bytes) -> bytes:
    written = fuzz_mutations.text(source, head)
    length = len(written) if source.random() < 0.95 else source.choice(fuzz_mutations.NUMBERS)
    return length.to_bytes(8, "little") + written + body


class Safetensors:
    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return ()

    def make(self, source: random.Random) -> dict[str, bytes]:
        whole = source.random() < 0.7
        files, placed = {}, {}
        for number, name in enumerate((safetensors.SINGLE,) if whole else FILES):
            head, body = header(source, 10 * number)
            placed |= {key: name for key in head if key != "__metadata__"}
            for _ in range(source.choice((0, 1, 1, 2))):
                head = fuzz_mutations.spoil(source, head, WORDS)
            files[name] = joined(source, head, body)
            if source.random() < 0.3:
                files[name] = fuzz_mutations.spoil_bytes(source, files[name])
        if not whole:
            index: Any = {"metadata": {}, "weight_map": placed}
            if source.random() < 0.5:
                index = fuzz_mutations.spoil(source, index, (*WORDS, *FILES))
            files[safetensors.INDEX] = fuzz_mutations.text(source, index)
        return files

    def read(self, folder: pathlib.Path) -> str:
        tensors = safetensors.read_folder(folder)
        for tensor in tensors.values():
            assert tensor.values().nbytes == tensor.raw.nbytes
        for path in {tensor.file.path for tensor in tensors.values()}:
            assert path.parent == folder, f"{path} is elsewhere"
            _compare(path, {x.name: x for x in tensors.values() if x.file.path == path})
        return "read"


def _compare(path: pathlib.Path, tensors: dict[str, safetensors.Tensor]) -> None:
    import safetensors as library

    theirs = dict(library.deserialize(path.read_bytes()))
    assert theirs.keys() == tensors.keys(), "the library reads other tensors"
    for name, tensor in tensors.items():
        own = (tensor.dtype, list(tensor.shape), tensor.raw.tobytes())
        assert own == (theirs[name]["dtype"], theirs[name]["shape"], bytes(theirs[name]["data"])), (
            name
        )
