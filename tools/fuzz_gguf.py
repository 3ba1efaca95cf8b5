# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: .gguf files, put together entry by entry so that single counts, types and lengths can lie."""

import copy
import functools
import pathlib
import random
import struct
import tempfile
from typing import Any

import fuzz_mutations
import fuzz_tiny
import numpy as np

from jft.models import gguf, gguf_export, gguf_file, quantizing

KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMPY = {"f": 6, "i": 5, "u": 4, "b": 7}
STRING, ARRAY = 8, 9
TEXT = "hello the user asks for red 123\n\n  x"

Pairs = list[list[Any]]  # of key, kind, value; an array's value is [kind, list]
Infos = list[list[Any]]  # of name, dimensions, kind, offset


@functools.cache
def seeds() -> tuple[tuple[Pairs, Infos, bytes], ...]:
    """Files as they should be, taken apart: byte-level BPE, and sentencepiece's."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "m.gguf"
        config, params, words = fuzz_tiny.model()
        gguf_export.save(path, config, params, words, "f16")
        first = _apart(path)
    second = copy.deepcopy(first)
    pairs = [pair for pair in second[0] if not pair[0].startswith("tokenizer.")]
    return first, ([*pairs, *_sentencepiece(config.vocab_size)], *second[1:])


def _apart(path: pathlib.Path) -> tuple[Pairs, Infos, bytes]:
    file = gguf_file.read(path)
    pairs = [[key, *_typed(value)] for key, value in file.metadata.items()]
    infos, body = [], b""
    for tensor in file.tensors.values():
        infos.append([tensor.name, list(tensor.shape[::-1]), tensor.kind, len(body)])
        body += tensor.raw.tobytes() + b"\0" * (-tensor.raw.size % 32)
    return pairs, infos, bytes(len(body))  # zeros: a case that is kept is small


def _typed(value: Any) -> tuple[int, Any]:
    match value:
        case bool():
            return 7, value
        case int():
            return 4, value
        case float():
            return 6, value
        case str():
            return STRING, value
        case np.ndarray():
            return ARRAY, [NUMPY[value.dtype.kind], value.tolist()]
    return ARRAY, [STRING, list(value)]


def _sentencepiece(size: int) -> Pairs:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "ab",
    ]
    tokens += ["\u2581a", *(f"w{i}" for i in range(size - len(tokens) - 3)), "w", "<t>"]
    tokens += list("0123456789")
    tokens = list(dict.fromkeys(tokens))[:size]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)][: len(tokens)]
    scores = [-float(i) for i in range(len(tokens))]
    own = {
        "tokens": [STRING, tokens],
        "token_type": [5, kinds],
        "scores": [6, scores],
    }
    pairs: Pairs = [[f"tokenizer.ggml.{key}", ARRAY, value] for key, value in own.items()]
    pairs += [["tokenizer.ggml.model", STRING, "llama"], ["tokenizer.ggml.bos_token_id", 4, 1]]
    return [
        *pairs,
        ["tokenizer.ggml.eos_token_id", 4, 2],
        ["tokenizer.chat_template", STRING, "{{ x }}"],
    ]


class _Writer:
    """Writes entries; now and then a length or type is another."""

    def __init__(self, source: random.Random, lies: float) -> None:
        self.source, self.lies = source, lies

    def number(self, kind: str, value: Any) -> bytes:
        if self.source.random() < self.lies:
            value = self.source.choice(fuzz_mutations.NUMBERS)
        try:
            return struct.pack(f"<{kind}", value)
        except (struct.error, OverflowError, TypeError, ValueError):
            return struct.pack("<" + kind, 0)

    def text(self, value: Any) -> bytes:
        held = str(value).encode("utf-8", "surrogatepass")
        return self.number("Q", len(held)) + held

    def value(self, kind: int, value: Any) -> bytes:
        if kind == STRING:
            return self.text(value)
        if kind == ARRAY and isinstance(value, list) and len(value) == 2:
            inner, items = value
            inner = inner if isinstance(inner, int) else 4
            items = items if isinstance(items, list) else [items]
            head = self.number("I", inner) + self.number("Q", len(items))
            return head + b"".join(self.value(inner, item) for item in items)
        return self.number(KINDS.get(kind, "I") if isinstance(kind, int) else "I", value)

    def file(self, pairs: Pairs, infos: Infos, body: bytes) -> bytes:
        head = (
            b"GGUF"
            + self.number("I", 3)
            + self.number("Q", len(infos))
            + self.number("Q", len(pairs))
        )
        for key, kind, value in pairs:
            head += self.text(key) + self.number("I", kind) + self.value(kind, value)
        for name, shape, kind, offset in infos:
            head += self.text(name) + self.number("I", len(shape))
            head += b"".join(self.number("Q", size) for size in shape)
            head += self.number("I", kind) + self.number("Q", offset)
        return head + b"\0" * (-len(head) % 32) + body


def _spoil_pairs(source: random.Random, pairs: Pairs) -> None:
    at = source.randrange(len(pairs))
    match source.randint(0, 5):
        case 0:
            del pairs[at]
        case 1:
            pairs.append(copy.deepcopy(pairs[at]))
            pairs[-1][0] = source.choice(
                [pairs[at][0], pairs[source.randrange(len(pairs))][0], "general.alignment"]
            )
        case 2:
            pairs[at][1:] = pairs[source.randrange(len(pairs))][1:]
        case 3:
            pairs[at][1:] = _typed(source.choice((*ODD, *fuzz_mutations.NUMBERS)))
        case 4 if pairs[at][1] == ARRAY and isinstance(pairs[at][2][1], list) and pairs[at][2][1]:
            items = pairs[at][2][1]
            items[source.randrange(len(items))] = source.choice(ODD)
        case _:
            pairs[at] = fuzz_mutations.spoil(source, pairs[at])
            pairs[at] = (
                (list(pairs[at]) + [0, 0, 0])[:3] if isinstance(pairs[at], list) else ["x", 4, 1]
            )


ODD: tuple[Any, ...] = (
    "",
    "a\nb",
    "x" * 3000,
    "<0x00>",
    "\u2581",
    0,
    1,
    -1,
    0.0,
    1e38,
    float("nan"),
    True,
    ["a", "b"],
    [],
    "a b c",
)


class Gguf:
    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return ()

    def make(self, source: random.Random) -> dict[str, bytes]:
        pairs, infos, body = copy.deepcopy(source.choice(seeds()))
        for _ in range(source.choice((0, 1, 1, 2, 4))):
            _spoil_pairs(source, pairs)
        if source.random() < 0.3:
            info = source.choice(infos)
            info[source.randrange(4)] = copy.deepcopy(source.choice(infos))[source.randrange(4)]
            infos[:] = [
                one if isinstance(one[1], list) else [one[0], [one[1]], *one[2:]] for one in infos
            ]
        data = _Writer(source, source.choice((0, 0, 0, 1e-4, 1e-3))).file(pairs, infos, body)
        if source.random() < 0.2:
            data = fuzz_mutations.spoil_bytes(source, data)
        return {"m.gguf": data}

    def read(self, folder: pathlib.Path) -> str:
        path = folder / "m.gguf"
        gguf_file.read(path)
        words = gguf.tokenizer(path)
        words(TEXT)
        gguf.shapes(path, "float32", quantizing.DENSE)
        gguf.load(path, "float32")
        return "read"
