# SPDX-License-Identifier: Apache-2.0
"""Model folders: what is read is what was written, and every fault is told by file and key."""

import dataclasses
import json
import pathlib
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jft import errors, tree
from jft.models import decoder, fingerprint, hf, llama, safetensors

CONFIG = decoder.Config(
    vocab_size=40,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=24,
    max_length=64,
)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32", "float16": "F16"}
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, np.ndarray]


def make(config: decoder.Config = CONFIG, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(0)
    rows = llama.tensors(config).items()
    return {n: rng.standard_normal(w.stored_shape(config)).astype(dtype) for n, (w, _) in rows}


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, body = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(body), len(body) + len(raw)]
        entry = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        header[name], body = entry, body + raw
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write(folder: pathlib.Path, tensors: Tensors, config: decoder.Config = CONFIG) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama.to_hf(config)))
    write_file(folder / "model.safetensors", tensors)
    return folder


def write_sharded(folder: pathlib.Path, tensors: Tensors) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama.to_hf(CONFIG)))
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        write_file(folder / file, {name: tensors[name] for name in part})
    placed = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: pathlib.Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def refusal(folder: pathlib.Path, dtype: str = "float32") -> str:
    with pytest.raises(errors.UserError) as caught:
        hf.load(folder, dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_leaves_hold_the_layers_in_order(tmp_path: pathlib.Path) -> None:
    tensors = make()
    config, params, _ = hf.load(write(tmp_path, tensors), "float32")
    assert config == CONFIG
    for layer in range(3):
        stored = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
        got = params["layers"]["attention"]["out"]["kernel"][layer]
        np.testing.assert_array_equal(got, stored.T.reshape(4, 6, 16))
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(
        params["embed"]["embedding"], tensors["model.embed_tokens.weight"]
    )
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == {
        weight.path: ((3,) if weight.per_layer else ()) + weight.shape(CONFIG)
        for weight in llama.WEIGHTS
    }


def test_shards_give_what_one_file_gives(tmp_path: pathlib.Path) -> None:
    one = hf.load(write(tmp_path / "one", make()), "float32")
    many = hf.load(write_sharded(tmp_path / "many", make()), "float32")
    assert one[2] == many[2]
    leaves = tree.flatten(many[1])
    for path, leaf in tree.flatten(one[1]).items():
        np.testing.assert_array_equal(leaf, leaves[path], path)


def test_bfloat16_keeps_its_bits(tmp_path: pathlib.Path) -> None:
    tensors = make(dtype=ml_dtypes.bfloat16)
    _, same, stored = hf.load(write(tmp_path, tensors), "bfloat16")
    _, wide, stored_wide = hf.load(tmp_path, "float32")
    assert stored == stored_wide
    bits = same["layers"]["mlp"]["up"]["kernel"][1].T.view(np.uint16)
    np.testing.assert_array_equal(bits, tensors[UP].view(np.uint16))
    assert wide["layers"]["mlp"]["up"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(wide["layers"]["mlp"]["up"]["kernel"][1].T, tensors[UP])


def test_the_library_reads_the_same(shared: pathlib.Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    file = shared / "golden" / "tiny" / "model" / "model.safetensors"
    theirs = library.load_file(file)
    ours = safetensors.read(file)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.values(), theirs[name])


def test_fingerprint_tells_one_retrained_tensor(tmp_path: pathlib.Path) -> None:
    before = hf.load(write(tmp_path / "a", make()), "float32")[2]
    tensors = make()
    tensors[UP] = tensors[UP] + np.float32(1e-3)
    after = hf.load(write(tmp_path / "b", tensors), "float32")[2]
    assert before != after and before.startswith("sha256:")


def test_fingerprint_samples_the_whole_of_a_large_tensor() -> None:
    def of(raw: np.ndarray, dtype: str = "F32", shape: tuple[int, ...] = (1000, 1000)) -> str:
        return fingerprint.compute({"a": (dtype, shape, raw)})

    raw = np.zeros(4_000_000, np.uint8)
    seen = {of(raw), of(raw, "I32"), of(raw, shape=(500, 2000))}
    for place in (0, 2_000_000, raw.size - 1):  # a retrained tensor differs in whole stretches
        changed = raw.copy()
        changed[max(place - 40_000, 0) : place + 40_000] = 1
        seen.add(of(changed))
    assert len(seen) == 6


def test_loading_needs_the_parameters_and_little_more(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=4000, d_model=256, d_ff=1024)
    write(tmp_path, make(config, np.float16), config)
    tracemalloc.start()
    _, params, _ = hf.load(tmp_path, "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    leaves = tree.flatten(params).values()
    assert peak < sum(leaf.nbytes for leaf in leaves) + max(leaf.nbytes for leaf in leaves)


def _without(tensors: Tensors) -> None:
    del tensors[UP]


def _extra(tensors: Tensors) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors[UP]


def _misshapen(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].T


def _nan(tensors: Tensors) -> None:
    tensors[UP][7, 3] = np.nan


def _integers(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].astype(np.int32)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without, f"{UP} is missing (1 of 30"),
        (_extra, "model.layers.3.mlp.up_proj.weight: config.json asks for no such tensor"),
        (_misshapen, f"model.safetensors: {UP}: shape (16, 24), config.json says (24, 16)"),
        (_nan, f"model.safetensors: {UP}: has a value that is not finite, in row 7"),
        (_integers, f"model.safetensors: {UP}: stored as I32, not a float"),
    ],
)
def test_tensors_must_be_the_expected_ones(
    tmp_path: pathlib.Path, spoil: Callable[[Tensors], None], said: str
) -> None:
    tensors = make()
    spoil(tensors)
    assert said in refusal(write(tmp_path, tensors))


def test_values_too_large_for_the_dtype_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = make()
    tensors[UP][0, 0] = 1e6
    assert f"{UP}: has values too large for float16" in refusal(write(tmp_path, tensors), "float16")
    assert "dtype 'int8' is not one of float32" in refusal(tmp_path, "int8")


def test_harmless_extras_are_left_out(tmp_path: pathlib.Path) -> None:
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    tensors = make(tied)
    plain = hf.load(write(tmp_path / "plain", tensors, tied), "float32")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    extra = hf.load(write(tmp_path / "extra", tensors, tied), "float32")
    assert "head" not in extra[1] and plain[2] == extra[2]
    tensors["lm_head.weight"][0, 0] += 1
    message = refusal(write(tmp_path / "other", tensors, tied))
    assert "lm_head.weight: differs from model.embed_tokens.weight" in message


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "..", "x/../../a", "..\\a"])
def test_index_paths_stay_in_the_folder(tmp_path: pathlib.Path, file: str) -> None:
    folder = write_sharded(tmp_path, make())
    edit_index(folder, **{UP: file})
    assert "not a file's name in the folder" in refusal(folder)


def test_index_and_shards_must_agree(tmp_path: pathlib.Path) -> None:
    folder = write_sharded(tmp_path / "moved", make())
    held = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][UP]
    edit_index(folder, **{UP: {"a": "b", "b": "a"}[held[0]] + ".safetensors"})
    assert f"{UP} should be in" in refusal(folder)
    folder = write_sharded(tmp_path / "gone", make())
    (folder / "b.safetensors").unlink()
    assert "names b.safetensors, which is not in the folder" in refusal(folder)
    folder = write_sharded(tmp_path / "twice", make())
    write_file(folder / "a.safetensors", make())
    assert "is also in a.safetensors" in refusal(folder)
    folder = write_sharded(tmp_path / "both", make())
    write_file(folder / "model.safetensors", make())
    assert "both model.safetensors and model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "no model.safetensors and no model.safetensors.index.json"),
        ("pytorch_model.bin", "pickled files are never read"),
        ("model.Q4_0.gguf", "give that file's path"),
        ("adapter_config.json", "an adapter's folder"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(
    tmp_path: pathlib.Path, file: str | None, said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama.to_hf(CONFIG)))
    if file:
        (tmp_path / file).touch()
    assert said in refusal(tmp_path)


def test_configuration_must_be_there_and_be_json(tmp_path: pathlib.Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "a JSON object is expected, not list" in refusal(tmp_path)


def _header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


_ONE = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (b"\xff" * 8 + b"{}", "cut short"),
        (_header("nonsense"), "not JSON"),
        (_header("[]"), "not a JSON object"),
        (_header(f"{{{_ONE}}}") + bytes(7), "a: ends at byte 8 of 7"),
        (_header(f"{{{_ONE}}}") + bytes(9), "1 bytes after the last tensor"),
        (_header(f"{{{_ONE}, {_ONE}}}") + bytes(8), "names a twice"),
        (_header(f"{{{_ONE}, {_ONE.replace('a', 'b', 1)}}}") + bytes(8), "overlap"),
        (_header(f"{{{_ONE.replace('[2]', '[3]')}}}") + bytes(8), "needs 12 bytes"),
        (_header(f"{{{_ONE.replace('[2]', '[-2]')}}}") + bytes(8), "malformed"),
        (_header(f"{{{_ONE.replace('F32', 'F8_E4M3')}}}") + bytes(8), "stored as F8_E4M3"),
        (_header('{"a": 1}'), "malformed"),
    ],
)
def test_damaged_files_are_told(tmp_path: pathlib.Path, data: bytes, said: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(errors.UserError) as caught:
        safetensors.read(file)
    assert said in str(caught.value) and str(caught.value).startswith(str(file))


def _tokenizer_folder(folder: pathlib.Path, **settings: Any) -> pathlib.Path:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"12": len(vocab), "<|end|>": len(vocab) + 1}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("1", "2")]))
    cuts = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(cuts)
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(llama.to_hf(CONFIG)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"} | settings))
    return folder


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_cuts_as_its_file_says(tmp_path: pathlib.Path, kind: str) -> None:
    found = hf.tokenizer(_tokenizer_folder(tmp_path, tokenizer_class=kind))
    assert found.tokenize("a12") == ["a", "1", "2"]
    assert found.eos_token == "<|end|>"


def test_tokenizer_runs_no_code_of_the_folder(tmp_path: pathlib.Path) -> None:
    folder = _tokenizer_folder(
        tmp_path, tokenizer_class="Foreign", auto_map={"AutoTokenizer": ["foreign.Foreign", None]}
    )
    (folder / "tokenizer.json").unlink()
    (folder / "foreign.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Foreign: ...\n")
    with pytest.raises(errors.UserError, match="the tokenizer can't be loaded"):
        hf.tokenizer(folder)
    assert not (folder / "ran").exists()


def test_tokenizer_faults_are_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"no tokenizer.json and no tokenizer_config.json"):
        hf.tokenizer(tmp_path)
    (_tokenizer_folder(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(errors.UserError) as caught:
        hf.tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
