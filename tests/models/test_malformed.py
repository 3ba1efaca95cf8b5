# SPDX-License-Identifier: Apache-2.0
"""Model folders with one fault each: refused in one line that names the file and the tensor or key, and says what is wrong."""

import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jft
from jft import errors
from jft.models import hf

Folder = pathlib.Path
Fault = Callable[[Folder], Any]

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARDS = ("a.safetensors", "b.safetensors")
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tiny_model: Folder, tmp_path: Folder) -> Folder:
    """A good folder of our own to spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


# A file is taken apart and put together by hand: no library would write these.
def apart(path: Folder) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def together(path: Folder, header: dict[str, Any] | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def entry(change: Callable[[dict[str, Any]], Any], name: str = UP) -> Fault:
    """Changes what the header says of a tensor."""

    def fault(folder: Folder) -> None:
        header, body = apart(folder / FILE)
        change(header[name])
        together(folder / FILE, header, body)

    return fault


def text(change: Callable[[str], str]) -> Fault:
    """Changes the header as text."""

    def fault(folder: Folder) -> None:
        header, body = apart(folder / FILE)
        together(folder / FILE, change(json.dumps(header)), body)

    return fault


def value(number: float, name: str = UP, at: int = -1) -> Fault:
    """Changes one number of a tensor."""

    def fault(folder: Folder) -> None:
        header, body = apart(folder / FILE)
        start, stop = header[name]["data_offsets"]
        values = np.frombuffer(body[start:stop], np.float32).copy()
        values[at] = number
        together(folder / FILE, header, body[:start] + values.tobytes() + body[stop:])

    return fault


def add(name: str, array: np.ndarray | None = None, dtype: str = "F32") -> Fault:
    """Adds a tensor at the end: zeros in the embedding's shape when none is given."""

    def fault(folder: Folder) -> None:
        header, body = apart(folder / FILE)
        shape = header[EMBEDDING]["shape"]
        more = np.zeros(shape, np.float32) if array is None else array
        offsets = [len(body), len(body) + more.nbytes]
        header[name] = {"dtype": dtype, "shape": list(more.shape), "data_offsets": offsets}
        together(folder / FILE, header, body + more.tobytes())

    return fault


def without(name: str) -> Fault:
    def fault(folder: Folder) -> None:
        header, body = apart(folder / FILE)
        held = {
            key: (own, body[slice(*own["data_offsets"])])
            for key, own in header.items()
            if key not in (name, "__metadata__")
        }
        header, body = {}, b""
        for key, (own, raw) in held.items():
            header[key] = own | {"data_offsets": [len(body), len(body) + len(raw)]}
            body += raw
        together(folder / FILE, header, body)

    return fault


def bytes_of(change: Callable[[bytes], bytes]) -> Fault:
    def fault(folder: Folder) -> None:
        (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))

    return fault


def config(**changes: Any) -> Fault:
    """Changes keys of config.json; None takes one away."""

    def fault(folder: Folder) -> None:
        keys = json.loads((folder / CONFIG).read_text()) | changes
        kept = {key: own for key, own in keys.items() if key not in changes or own is not None}
        (folder / CONFIG).write_text(json.dumps(kept))

    return fault


def write(name: str, data: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(data)


def instead(name: str, make: Callable[[Folder], Any], original: str = FILE) -> Fault:
    """Takes the weights away (another file with `original`) and puts something in their place."""

    def fault(folder: Folder) -> None:
        (folder / original).unlink()
        make(folder / name)

    return fault


def split(folder: Folder) -> dict[str, str]:
    """Turns the one file into two shards and an index; the index's map."""
    header, body = apart(folder / FILE)
    names, placed = sorted(set(header) - {"__metadata__"}), {}
    for i, file in enumerate(SHARDS):
        part, data = {}, b""
        for name in names[i::2]:
            raw = body[slice(*header[name]["data_offsets"])]
            part[name] = header[name] | {"data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        together(folder / file, part, data)
        placed |= dict.fromkeys(part, file)
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return placed


def index(**changes: str) -> Fault:
    """Two shards whose index says other things of some tensors."""

    def fault(folder: Folder) -> None:
        placed = split(folder) | changes
        (folder / INDEX).write_text(json.dumps({"weight_map": placed}))

    return fault


def wrong_file(folder: Folder) -> None:
    held = split(folder)[UP]
    other = next(file for file in SHARDS if file != held)
    placed = json.loads((folder / INDEX).read_text())["weight_map"] | {UP: other}
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def twice(folder: Folder) -> None:
    whole = (folder / FILE).read_bytes()
    split(folder)
    (folder / SHARDS[0]).write_bytes(whole)


def unlisted(folder: Folder) -> None:
    placed = split(folder)
    del placed[UP]
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def linked(name: str, prepare: Fault = lambda folder: None) -> Fault:
    """A link that leads out of the folder, as none of a Hub's cache does."""

    def fault(folder: Folder) -> None:
        prepare(folder)
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to("../elsewhere")

    return fault


def hole(folder: Folder) -> None:
    """Moves the last tensor by four bytes."""
    header, body = apart(folder / FILE)
    last = max(
        (own for key, own in header.items() if key != "__metadata__"),
        key=lambda own: own["data_offsets"],
    )
    start, stop = last["data_offsets"]
    last["data_offsets"] = [start + 4, stop + 4]
    together(folder / FILE, header, body[:start] + bytes(4) + body[start:])


FAULTS: dict[str, tuple[Fault, str]] = {
    # The weights' file.
    "empty": (bytes_of(lambda data: b""), f"{FILE}: .*cut short: .* and the file has 0"),
    "cut in the header": (bytes_of(lambda data: data[:40]), f"{FILE}: .*cut short: .* has 40"),
    "cut in the body": (
        bytes_of(lambda data: data[:-5]),
        f"{FILE}: model.*weight: ends at byte [0-9]+ of [0-9]+: the file is cut short",
    ),
    "too long": (
        bytes_of(lambda data: data + b"?"),
        f"{FILE}: 1 bytes after the last tensor belong to none",
    ),
    "absurd length": (bytes_of(lambda data: b"\xff" * 8 + data[8:]), f"{FILE}: .*cut short"),
    "header not JSON": (text(lambda header: header[:-1] + "?"), f"{FILE}: .*header is not JSON"),
    "header not UTF-8": (
        bytes_of(lambda data: data[:9] + b"\xff" + data[10:]),
        f"{FILE}: .*header is not JSON",
    ),
    "header too deep": (text(lambda header: "[" * 100000), f"{FILE}: .*header is not JSON"),
    "header with an endless number": (
        text(lambda header: header.replace("[32]", f"[{'9' * 5000}]", 1)),
        f"{FILE}: .*header is not JSON",
    ),
    "header a list": (text(lambda header: "[]"), f"{FILE}: .*header is not a JSON object"),
    "name twice": (
        text(lambda header: header.replace("layers.0.mlp.up_proj", "layers.1.mlp.up_proj")),
        f"{FILE}: .*header is not JSON: '{UP}' is there twice",
    ),
    "name of two lines": (
        text(lambda header: header.replace(UP, "a\\nb")),
        rf"{FILE}: 'a\\nb': the header's entry is malformed",
    ),
    "entry a number": (
        text(lambda header: re.sub(rf'("{UP}": ){{.*?}}', r"\g<1>1", header)),
        f"{FILE}: {UP}: the header's entry is malformed: 1",
    ),
    "dtype a list": (entry(lambda own: own.update(dtype=["F32"])), f"{UP}: .*malformed"),
    "shape negative": (entry(lambda own: own.update(shape=[-48, -32])), f"{UP}: .*malformed"),
    "dtype unknown": (
        entry(lambda own: own.update(dtype="F8_E4M3")),
        f"{FILE}: {UP}: stored as F8_E4M3, which is not read",
    ),
    "size against shape": (
        entry(lambda own: own.update(shape=[48, 33])),
        rf"{FILE}: {UP}: F32 \[48, 33\] needs 6336 bytes, the header gives 6144",
    ),
    "overlap": (
        entry(lambda own: own.update(data_offsets=[x - 4 for x in own["data_offsets"]])),
        f"{FILE}: model.*: the tensors' bytes overlap at",
    ),
    "hole": (
        hole,
        f"{FILE}: model.*: the tensors' bytes leave a hole at",
    ),
    "a folder": (
        instead(FILE, lambda path: path.mkdir()),
        f"{FILE}: is a folder, not a file",
    ),
    "a pipe": (instead(FILE, os.mkfifo), f"{FILE}: is no file that can be read"),
    "a link to itself": (
        instead(FILE, lambda path: path.symlink_to(FILE)),
        f"{FILE}: is no file that can be read",
    ),
    "a link out of the folder": (
        linked(FILE),
        f"{FILE} is a link to .*elsewhere, outside its folder",
    ),
    "no weights": (instead("x", Folder.touch), f"no {FILE} and no {INDEX}"),
    "pickle": (
        instead("pytorch_model.bin", Folder.touch),
        r"there is pytorch_model.bin: pickled files are never read; convert",
    ),
    "a GGUF": (instead("m.Q4_0.gguf", Folder.touch), "there is m.Q4_0.gguf: give that file's path"),
    "an adapter": (instead("adapter_config.json", Folder.touch), "this is an adapter's folder"),
    # Tensors.
    "missing": (without(UP), rf"model: {UP} is missing \(1 of 20 tensors are\)"),
    "extra": (
        add("model.layers.2.mlp.up_proj.weight"),
        rf"{FILE}: model.layers.2.mlp.up_proj.weight: config.json asks for no such tensor",
    ),
    "a buffer that is not known": (
        add("model.layers.1.attn.bias"),
        f"{FILE}: model.layers.1.attn.bias: config.json asks for no such tensor",
    ),
    "misshapen": (
        entry(lambda own: own["shape"].reverse()),
        rf"{FILE}: {UP}: shape \(32, 48\), config.json says \(48, 32\)",
    ),
    "integers": (
        entry(lambda own: own.update(dtype="I32")),
        f"{FILE}: {UP}: stored as I32, not a float",
    ),
    "not a number": (
        value(np.nan, at=7 * 32 + 3),
        f"{FILE}: {UP}: has a value that is not finite, in row 7",
    ),
    "infinite": (value(-np.inf), f"{FILE}: {UP}: has a value that is not finite, in row 47"),
    "not a number in a norm": (
        value(np.nan, NORM, 5),
        f"{FILE}: {NORM}: has a value that is not finite, in row 5",
    ),
    "too large for bfloat16": (
        value(float(np.finfo(np.float32).max)),
        f"{FILE}: {UP}: has values too large for bfloat16",
    ),
    "another head": (
        add("lm_head.weight"),
        f"{FILE}: lm_head.weight: differs from {EMBEDDING}, and config.json says tie_word_emb",
    ),
    "a head of another dtype": (
        add("lm_head.weight", np.zeros((304, 32), ml_dtypes.bfloat16), "BF16"),
        f"{FILE}: lm_head.weight: differs from {EMBEDDING}",
    ),
    # Shards.
    "index beside one file": (write(INDEX, b"{}"), f"both {FILE} and {INDEX} are there; remove"),
    "index not JSON": (instead(INDEX, lambda path: path.write_text("{")), f"{INDEX}: not JSON"),
    "index without a map": (
        instead(INDEX, lambda path: path.write_text("{}")),
        f"{INDEX}: weight_map is not an object of names and files",
    ),
    "index with a number": (index(**{UP: 3}), f"{INDEX}: weight_map is not an object"),
    "index with a control character": (index(**{UP: "a\0b"}), f"{INDEX}: weight_map is not an"),
    "index above the folder": (
        index(**{UP: "../a.safetensors"}),
        f"{INDEX}: weight_map has {UP} in '../a.safetensors', not a file's name in the folder",
    ),
    "index absolute": (index(**{UP: "/etc/passwd"}), f"{UP} in '/etc/passwd', not a file's name"),
    "index at dots": (index(**{UP: ".."}), f"{UP} in '..', not a file's name in the folder"),
    "index roundabout": (index(**{UP: "x/../../a"}), f"{UP} in 'x/../../a', not a file's name"),
    "index of Windows": (index(**{UP: "..\\a"}), rf"{UP} in '..\\\\a', not a file's name"),
    "index names the wrong file": (wrong_file, rf"{INDEX}: {UP} should be in [ab].*and is not"),
    "index lacks a tensor": (unlisted, rf"[ab].safetensors: {UP}: is not in {INDEX}"),
    "index has one too many": (
        index(**{"model.x": SHARDS[0]}),
        f"{INDEX}: model.x should be in {SHARDS[0]} and is not",
    ),
    "tensor in two shards": (twice, rf"{SHARDS[1]}: model.*: is also in {SHARDS[0]}"),
    "shard missing": (
        lambda folder: (split(folder), (folder / SHARDS[1]).unlink()),
        rf"{INDEX}: model.* is in {SHARDS[1]}, which is not in the folder",
    ),
    "shard cut": (
        lambda folder: (split(folder), os.truncate(folder / SHARDS[1], 3000)),
        f"{SHARDS[1]}: model.*: the file is cut short",
    ),
    "shard a link out of the folder": (
        linked(SHARDS[0], split),
        f"{SHARDS[0]} is a link to .*elsewhere, outside its folder",
    ),
    # config.json; what its switches mean is tested with the families.
    "configuration missing": (instead("x", Folder.touch, CONFIG), f"model: no {CONFIG}"),
    "configuration not JSON": (write(CONFIG, b"{"), f"{CONFIG}: not JSON"),
    "configuration not UTF-8": (write(CONFIG, b'{"a": "\xff"}'), f"{CONFIG}: not JSON"),
    "configuration a list": (write(CONFIG, b"[]"), f"{CONFIG}: a JSON object is expected, not l"),
    "configuration a folder": (
        instead(CONFIG, lambda path: path.mkdir(), CONFIG),
        f"{CONFIG}: is a folder, not a file",
    ),
    "configuration a link out": (linked(CONFIG), f"{CONFIG} is a link to .*elsewhere, outside"),
    "size missing": (config(hidden_size=None), f"{CONFIG}: hidden_size is missing"),
    "size negative": (config(hidden_size=-32), f"{CONFIG}: hidden_size is -32, not a positive"),
    "vocabulary against embedding": (
        config(vocab_size=300),
        rf"{FILE}: {EMBEDDING}: shape \(304, 32\), config.json says \(300, 32\)",
    ),
    "untied without a head": (
        config(tie_word_embeddings=False),
        r"model: lm_head.weight is missing .*; is tie_word_embeddings of config.json right\?",
    ),
    "architecture unknown": (
        config(architectures=["MambaForCausalLM"]),
        rf"{CONFIG}: architectures is \['MambaForCausalLM'\]; implemented are Llama",
    ),
    "architecture against model_type": (
        config(model_type="mistral"),
        f"{CONFIG}: model_type is 'mistral', and architectures is .*, which has 'llama'",
    ),
    "rope unknown": (
        config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        f"{CONFIG}: .*rope_type is 'dynamic'",
    ),
    "activation unknown": (config(hidden_act="quick_gelu"), f"{CONFIG}: hidden_act is 'quick_g"),
    "window where there is none": (
        config(sliding_window=16),
        f"{CONFIG}: sliding_window is 16, which is not implemented for this family",
    ),
    "quantised": (
        config(quantization_config={"bits": 4}),
        rf"{CONFIG}: quantization_config is {{'bits': 4}}, which is not implemented",
    ),
}


def refusals(folder: Folder, dtype: str) -> str:
    """The message, which must be one line and the same from the function and from `jft.load`."""
    said = []
    for load in (lambda: hf.load(folder, dtype), lambda: jft.load(str(folder), dtype=dtype)):
        with pytest.raises(errors.UserError) as caught:
            load()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0] and str(folder) in said[0]
    return said[0]


def test_the_folder_is_good_before_it_is_spoilt(model: Folder) -> None:
    before = jft.load(str(model)).fingerprint
    split(model)
    assert jft.load(str(model)).fingerprint == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_folder_is_refused(model: Folder, fault: str) -> None:
    spoil, said = FAULTS[fault]
    spoil(model)
    dtype = "bfloat16" if "bfloat16" in fault else "float32"
    assert re.search(said, refusals(model, dtype))


@pytest.mark.parametrize("name", [FILE, CONFIG])
def test_a_file_that_may_not_be_read(
    model: Folder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / name).chmod(0)
    if os.access(model / name, os.R_OK):  # root may read everything
        plain = Folder.open

        def opened(path: Folder, *args: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return plain(path, *args, **options)

        monkeypatch.setattr(Folder, "open", opened)
        monkeypatch.setattr(Folder, "read_bytes", lambda path: opened(path, "rb").read())
    assert refusals(model, "float32").endswith(f"{name}: Permission denied")


def test_a_folder_that_is_not_there(tmp_path: Folder) -> None:
    with pytest.raises(errors.UserError, match=r"absent: no config.json \(there is no such folder"):
        hf.load(tmp_path / "absent", "float32")


@pytest.mark.parametrize("inner", ["", "sub"])
def test_the_links_of_a_hub_cache_are_followed(model: Folder, tmp_path: Folder, inner: str) -> None:
    """huggingface_hub keeps snapshots of links into its folder of blobs."""
    before = hf.load(model, "float32")[2]
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / "0123abc" / inner
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    split(model)
    for i, file in enumerate((*SHARDS, INDEX, CONFIG)):
        shutil.copy(model / file, root / "blobs" / str(i))
        (snapshot / file).symlink_to(os.path.relpath(root / "blobs" / str(i), snapshot))
    assert hf.load(snapshot, "float32")[2] == before
    (tmp_path / "link").symlink_to(snapshot)
    assert hf.load(tmp_path / "link", "float32")[2] == before
    other = shutil.copytree(root / "blobs", tmp_path / "models--owner--other" / "blobs")
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(other / "0")
    with pytest.raises(errors.UserError, match="outside its folder"):
        hf.load(snapshot, "float32")
