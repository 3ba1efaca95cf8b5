# SPDX-License-Identifier: Apache-2.0
"""Model folders: what is read is what was written. Faults are in test_malformed, many devices in test_loading."""

import dataclasses
import json
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jft import errors, tree
from jft.models import architecture, families, fingerprint, hf, pages, safetensors

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
GPT2 = dataclasses.replace(
    families.PRESETS["gpt2"],
    vocab_size=40,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    d_ff=64,
    max_length=12,
)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "bool": "BOOL", "float16": "F16"}
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, np.ndarray]


def make(config: architecture.Config = CONFIG, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(0)
    rows = families.tensors(config).items()
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


def write(
    folder: pathlib.Path, tensors: Tensors, config: architecture.Config = CONFIG
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(families.to_hf(config)))
    write_file(folder / "model.safetensors", tensors)
    return folder


def write_sharded(folder: pathlib.Path, tensors: Tensors) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(families.to_hf(CONFIG)))
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        write_file(folder / file, {name: tensors[name] for name in part})
    placed = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


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
        weight.path: (3,) * len(weight.stacked) + weight.shape(CONFIG)
        for weight in families.weights(CONFIG)
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
    bits = np.asarray(same["layers"]["mlp"]["up"]["kernel"][1].T).view(np.uint16)
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


def test_values_too_large_for_the_dtype_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = make()
    tensors[UP][0, 0] = 1e6
    assert f"{UP}: has values too large for float16" in refusal(write(tmp_path, tensors), "float16")
    assert "dtype 'int8' is not one of float32" in refusal(tmp_path, "int8")
    # JAX would make float32 of it without a word.
    assert "dtype 'float64' needs jax_enable_x64" in refusal(tmp_path, "float64")


def test_parameters_may_move_to_other_devices(tmp_path: pathlib.Path) -> None:
    """What was loaded without shardings is not tied to the default device, as after `jax.device_put`."""
    params = hf.load(write(tmp_path, make()), "float32")[1]
    assert not any(leaf.committed for leaf in tree.flatten(params).values())


def test_files_are_mapped_once_and_late(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = [], mmap.mmap

    def counting(*args: Any, **options: Any) -> mmap.mmap:
        opened.append(args)
        return plain(*args, **options)

    folder = write_sharded(tmp_path, make())
    # `pages` looks for the class, which is a function now.
    monkeypatch.setattr(safetensors.mmap, "mmap", counting)
    monkeypatch.setattr("jft.models.pages.release", lambda array: None)
    tensors = safetensors.read_folder(folder)
    assert len(tensors) == 30 and not opened
    tensors[UP].values()
    assert len(opened) == 1
    hf.load(folder, "float32")
    assert len(opened) == 1 + 2


def test_pages_that_were_read_are_released(tmp_path: pathlib.Path) -> None:
    write_file(tmp_path / "x.safetensors", {"a": np.ones((4096, 1024), np.float32)})
    raw = safetensors.read(tmp_path / "x.safetensors")["a"].values()

    def resident() -> int:
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            pytest.skip("no /proc here")
        return int(status.read_text().split("RssFile:")[1].split()[0])  # KiB

    before = resident()
    assert raw.sum() == raw.size
    read = resident()
    pages.release(raw[:, 3:])
    after = resident()
    # 16 MiB; what else happens in the process meanwhile is small beside it.
    assert read - before > 14_000 and after - before < 2_000
    assert raw.sum() == raw.size
    own = np.ones(5)
    pages.release(own)
    assert own.sum() == 5


def test_harmless_extras_are_left_out(tmp_path: pathlib.Path) -> None:
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    tensors = make(tied)
    plain = hf.load(write(tmp_path / "plain", tensors, tied), "float32")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    extra = hf.load(write(tmp_path / "extra", tensors, tied), "float32")
    assert "head" not in extra[1] and plain[2] == extra[2]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq2"] = np.ones(3, np.float32)
    assert "inv_freq2: config.json asks for no such" in refusal(write(tmp_path, tensors, tied))


@pytest.mark.parametrize("config", [GPT2, CONFIG], ids=["gpt2", "llama"])
def test_names_may_all_lack_the_prefix_of_the_base_model(
    tmp_path: pathlib.Path, config: architecture.Config
) -> None:
    """OpenAI's file of GPT-2 does; and it holds the causal mask."""
    tensors = make(config)
    whole = hf.load(write(tmp_path / "whole", tensors, config), "float32")
    bare = {
        name.removeprefix("transformer.").removeprefix("model."): tensors[name] for name in tensors
    }
    if config is GPT2:
        for layer in range(2):
            bare[f"h.{layer}.attn.bias"] = np.tri(12, dtype=bool)[None, None]
            bare[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    found = hf.load(write(tmp_path / "bare", bare, config), "float32")
    assert found[2] == whole[2]
    leaves = tree.flatten(whole[1])
    for path, leaf in tree.flatten(found[1]).items():
        np.testing.assert_array_equal(leaf, leaves[path], path)


def test_names_that_lack_the_prefix_in_part_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = make()
    tensors[UP.removeprefix("model.")] = tensors.pop(UP)
    assert f"{UP} is missing (1 of 30" in refusal(write(tmp_path / "one", tensors))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in make(GPT2).items()}
    bare["h.0.attn.bias.0"] = np.ones(3, np.float32)
    message = refusal(write(tmp_path / "other", bare, GPT2))
    assert "model.safetensors: h.0.attn.bias.0: config.json asks for no such tensor" in message


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
    (folder / "config.json").write_text(json.dumps(families.to_hf(CONFIG)))
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
