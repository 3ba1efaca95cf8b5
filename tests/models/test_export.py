# SPDX-License-Identifier: Apache-2.0
"""Exported folders: every bit of every family comes back, whatever the shards; nothing half-written looks whole."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_models
from safetensors import numpy as library

from jft import errors, quant, tree
from jft.models import architecture, decoder, export, families, fingerprint, hf, names, shards

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "families"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
SPELLED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CONFIG = architecture.Config(
    vocab_size=40,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=24,
    max_length=64,
)
Tensors = dict[str, np.ndarray]


def small(preset: str) -> architecture.Config:
    """A small model as its own config.json says it: what follows from sizes is that of the small ones."""
    return families.from_hf(families.to_hf(small_models.small(preset)))


def make(config: architecture.Config, dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    """The tensors of a checkpoint, by their names in files."""
    rng = np.random.default_rng(0)
    rows = families.tensors(config).items()
    return {n: rng.standard_normal(w.stored_shape(config)).astype(dtype) for n, (w, _) in rows}


def write(folder: pathlib.Path, config: architecture.Config, tensors: Tensors) -> pathlib.Path:
    """A checkpoint, written without anything of `export`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(families.to_hf(config)))
    header, body = {}, b""
    for name, array in tensors.items():
        offsets = [len(body), len(body) + array.nbytes]
        spelled = SPELLED[array.dtype.name]
        header[name] = {"dtype": spelled, "shape": array.shape, "data_offsets": offsets}
        body += array.tobytes()
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return folder


@functools.cache
def params_of(config: architecture.Config) -> Any:
    """Random parameters, float32."""
    rng = np.random.default_rng(1)
    leaves = tree.flatten(decoder.shapes(config))
    drawn = {k: rng.standard_normal(x.shape, np.float32) for k, x in leaves.items()}
    return tree.unflatten(drawn)


def files_of(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stored_in(folder: pathlib.Path) -> Mapping[str, np.ndarray]:
    """All tensors of a folder, read by the library."""
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in library.load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", small_models.ONE_EACH)
def test_a_checkpoint_that_is_read_and_written_is_the_same(
    preset: str, tied: bool, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(small(preset), tie_embeddings=tied)
    tensors = make(config)
    read, params, stored = hf.load(write(tmp_path / "theirs", config, tensors), "bfloat16")
    assert read == config
    for name, limit in (("one", export.MAX_SHARD_SIZE), ("many", 2000)):
        written = export.save(tmp_path / name, read, params, None, max_shard_size=limit)
        ours = stored_in(tmp_path / name)
        assert ours.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert ours[key].dtype == tensor.dtype
            np.testing.assert_array_equal(
                ours[key].view(np.uint16), tensor.view(np.uint16), err_msg=key
            )
        again, back, fingerprint_again = hf.load(tmp_path / name, "bfloat16")
        assert again == config and fingerprint_again == stored == written.fingerprint
        for path, leaf in tree.flatten(params).items():
            got = tree.flatten(back)[path]
            np.testing.assert_array_equal(got.view(np.uint16), leaf.view(np.uint16), path)
    assert ("lm_head.weight" in ours) != tied


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saved_is_saved_again(case: str, tmp_path: pathlib.Path) -> None:
    config, params, stored = hf.load(GOLDENS / case, "bfloat16")
    written = export.save(tmp_path / "m", config, params, None, max_shard_size=4000)
    theirs, ours = stored_in(GOLDENS / case), stored_in(tmp_path / "m")
    assert ours.keys() == theirs.keys() and written.fingerprint == stored
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint16), tensor.view(np.uint16), name)
    assert hf.read_config(tmp_path / "m") == config


def test_shards_keep_to_their_size_and_the_index_to_the_shards(tmp_path: pathlib.Path) -> None:
    limit = 1500
    written = export.save(tmp_path / "m", CONFIG, params_of(CONFIG), None, max_shard_size=limit)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * names.parameter_count(CONFIG)
    assert written.weight_bytes == index["metadata"]["total_size"]
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        held = library.load_file(tmp_path / "m" / file)
        assert sum(x.nbytes for x in held.values()) <= limit or len(held) == 1
        assert {name for name, own in index["weight_map"].items() if own == file} == held.keys()
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_mixed_dtypes_begin_where_torch_can_read_them(tmp_path: pathlib.Path) -> None:
    leaves = tree.flatten(params_of(CONFIG))
    kernels = {k: x.astype(ml_dtypes.bfloat16) for k, x in leaves.items() if "norm" not in k}
    mixed = tree.unflatten(leaves | kernels)
    written = export.save(tmp_path / "m", CONFIG, mixed, None)
    assert written.dtype == "float32"
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == sizes.keys()
    assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for e in header.values())
    _, back, _ = hf.load(tmp_path / "m", "float32")
    for path, leaf in tree.flatten(mixed).items():
        np.testing.assert_array_equal(tree.flatten(back)[path], leaf.astype(np.float32), path)


def test_a_dtype_is_rounded_to_once(tmp_path: pathlib.Path) -> None:
    written = export.save(tmp_path / "m", CONFIG, params_of(CONFIG), None, dtype="bfloat16")
    assert written.dtype == "bfloat16"
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    _, back, _ = hf.load(tmp_path / "m", "bfloat16")
    for path, leaf in tree.flatten(params_of(CONFIG)).items():
        rounded = np.asarray(jnp.asarray(leaf).astype(jnp.bfloat16))
        np.testing.assert_array_equal(tree.flatten(back)[path], rounded, path)


def test_quantised_leaves_are_written_unpacked(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, d_ff=64)
    leaves = tree.flatten(params_of(config))
    packed = quant.quantize(jnp.asarray(leaves["layers/mlp/up/kernel"]), "int8")
    export.save(
        tmp_path / "m", config, tree.unflatten(leaves | {"layers/mlp/up/kernel": packed}), None
    )
    _, back, _ = hf.load(tmp_path / "m", "float32")
    got = tree.flatten(back)["layers/mlp/up/kernel"]
    np.testing.assert_array_equal(got, np.asarray(packed.dequantize()))


def test_writing_needs_memory_for_one_tensor(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=4000, d_model=256, d_ff=1024, num_layers=6)
    params = params_of(config)
    largest = max(w.stored_shape(config) for w, _ in families.tensors(config).values())
    tracemalloc.start()
    export.save(tmp_path / "m", config, params, None, dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # bfloat16, its contiguous copy and the mask of finite numbers; all parameters are 22 MB.
    assert peak < 8 * np.prod(largest) < tree.nbytes(params) / 2


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jft.models import shards
assert len(jax.devices()) == 8
for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    leaf = np.random.default_rng(0).standard_normal((8, 6, 4), np.float32).astype(jax.numpy.bfloat16)
    for spec in (P(), P("a"), P("a", "b"), P(None, "b", "a"), P(("a", "b")), P(None, None, ("a",))):
        array = jax.device_put(leaf, NamedSharding(mesh, spec))
        for index in ((), (5,), (7, 3)):
            got = shards.host(array, index)
            assert got.dtype == leaf.dtype
            np.testing.assert_array_equal(got, leaf[index])
"""


def test_arrays_on_eight_devices_come_to_the_host(tmp_path: pathlib.Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def refusal(folder: pathlib.Path, params: Any = None, **options: Any) -> str:
    with pytest.raises(errors.UserError) as caught:
        export.save(folder, CONFIG, params or params_of(CONFIG), None, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_that_can_not_be_read_back_are_refused(tmp_path: pathlib.Path) -> None:
    spoiled = tree.flatten(params_of(CONFIG)) | {"final_norm/scale": np.full(16, 1e6, np.float32)}
    params = tree.unflatten(spoiled)
    said = refusal(tmp_path / "m", params, dtype="float16")
    assert "model.norm.weight: has values too large for float16" in said
    spoiled["final_norm/scale"] = np.full(16, np.nan, np.float32)
    said = refusal(tmp_path / "m", tree.unflatten(spoiled))
    assert "model.norm.weight: has values that are not finite" in said
    assert "dtype='int8'" in refusal(tmp_path / "m", dtype="int8")
    assert "max_shard_size=0" in refusal(tmp_path / "m", max_shard_size=0)
    assert files_of(tmp_path) == []


def test_an_interrupted_export_leaves_what_was_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = export.save(tmp_path / "old", CONFIG, params_of(CONFIG), None)
    real, calls = shards.write, []

    def interrupted(path: pathlib.Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(shards, "write", interrupted)
    for name in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            export.save(
                tmp_path / name,
                CONFIG,
                params_of(CONFIG),
                None,
                dtype="float16",
                max_shard_size=9999,
            )
    assert len(calls) == 4 and files_of(tmp_path) == ["old"]
    assert hf.load(tmp_path / "old", "float32")[2] == before.fingerprint


def test_a_folder_in_the_middle_of_being_replaced_is_no_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.save(tmp_path / "m", CONFIG, params_of(CONFIG), None)
    real = os.replace

    def failing(source: pathlib.Path, target: pathlib.Path) -> None:
        if source.name == "config.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert "can't be written: No space left on device" in refusal(tmp_path / "m", dtype="float16")
    with pytest.raises(errors.UserError, match="no config.json"):
        hf.load(tmp_path / "m", "float32")
    monkeypatch.undo()  # and the next attempt may still write there
    export.save(tmp_path / "m", CONFIG, params_of(CONFIG), None)


def test_an_earlier_export_is_replaced_and_no_other_folder(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "m"
    export.save(folder, CONFIG, params_of(CONFIG), None, max_shard_size=1500)
    (folder / "notes.txt").write_text("mine")
    written = export.save(folder, CONFIG, params_of(CONFIG), None, record={"source": "x"})
    assert files_of(folder) == ["config.json", "jft.json", "model.safetensors", "notes.txt"]
    record = json.loads((folder / "jft.json").read_text())
    assert record == {"kind": "model", "source": "x", "fingerprint": written.fingerprint}
    (folder / "jft.json").unlink()
    assert "is not empty, and no model that jft wrote" in refusal(folder)
    export.save(folder, CONFIG, params_of(CONFIG), None, max_shard_size=1500, force=True)
    assert "notes.txt" in files_of(folder) and "model.safetensors" not in files_of(folder)
    assert hf.load(folder, "float32")[2] == written.fingerprint
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(folder, force=True)
    assert "is a file; a model is a folder" in refusal(folder / "notes.txt")
    assert f"{folder / 'notes.txt'} is a file" in refusal(folder / "notes.txt" / "m")
    assert "is no place for a model" in refusal(pathlib.Path("/"))
    (tmp_path / "empty").mkdir()
    export.save(tmp_path / "empty", CONFIG, params_of(CONFIG), None)


def test_the_tokenizer_and_its_ids_go_along(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config, params, stored = hf.load(tiny_model, "float32")
    words = hf.tokenizer(tiny_model)
    end = words.convert_tokens_to_ids("<|im_end|>")
    written = export.save(tmp_path / "m", config, params, words, stop={end})
    assert written.fingerprint == stored
    again = hf.tokenizer(tmp_path / "m")
    text = "<|im_start|>user\nthe user asks 12345<|im_end|>\n"
    assert again(text)["input_ids"] == words(text)["input_ids"]
    assert again.chat_template == words.chat_template
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    assert settings | ids == settings and settings["pad_token_id"] is None
    assert generation == ids | {"eos_token_id": [words.eos_token_id, end]}
    # The class by which releases of transformers before 5 find it.
    assert "PreTrainedTokenizerFast" in (tmp_path / "m" / "tokenizer_config.json").read_text()


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path: pathlib.Path) -> None:
    params = params_of(CONFIG)
    one = export.save(tmp_path / "one", CONFIG, params, None)
    many = export.save(tmp_path / "many", CONFIG, params, None, max_shard_size=1)
    held = stored_in(tmp_path / "one")
    raw = {k: ("F32", x.shape, x.reshape(-1).view(np.uint8)) for k, x in held.items()}
    assert one.fingerprint == many.fingerprint == fingerprint.compute(raw)
