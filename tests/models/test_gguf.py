# SPDX-License-Identifier: Apache-2.0
"""GGUF files: weights as the converter meant them, its changes undone, tokenizers exact."""

import itertools
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jft import errors, tree
from jft.models import architecture, families, gguf, gguf_file, hf

package = pytest.importorskip("gguf")

CONFIG = architecture.Config(
    vocab_size=96,
    d_model=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=512,
    max_length=128,
    tie_embeddings=True,
)
QUERY = "model.layers.1.self_attn.q_proj.weight"
NAMES = {  # llama.cpp's for Hugging Face's
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
}
Kind = package.GGMLQuantizationType
Edit = Callable[[Any], None]


def make() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = families.tensors(CONFIG).items()
    return {n: rng.standard_normal(w.stored_shape(CONFIG), np.float32) for n, (w, _) in rows}


def as_converted(name: str, tensor: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter does to the rows of query and key projections."""
    heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}
    for module, count in heads.items():
        if module in name:
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    return tensor


def write(
    path: pathlib.Path,
    kind: Any = Kind.F32,
    arch: str = "llama",
    edit: Edit = lambda writer: None,
    skip: str = "",
) -> pathlib.Path:
    writer = package.GGUFWriter(str(path), arch)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_length)
    writer.add_embedding_length(CONFIG.d_model)
    writer.add_feed_forward_length(CONFIG.d_ff)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    edit(writer)
    for name, tensor in make().items():
        if name != skip:
            add(writer, name, as_converted(name, tensor), kind if tensor.ndim > 1 else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, name: str, tensor: np.ndarray, kind: Any) -> None:
    weight, index = families.tensors(CONFIG)[name]
    own = NAMES[weight.name.replace("model.layers.{layer}.", "").removesuffix(".weight")]
    if index:
        own = f"blk.{index[0]}.{own}"
    own += ".weight"
    if kind in (Kind.F32, Kind.F16):
        writer.add_tensor(own, package.quants.quantize(tensor, kind))
    else:
        writer.add_tensor(own, package.quants.quantize(tensor, kind), raw_dtype=kind)


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(errors.UserError) as caught:
        gguf.load(path, "float32")
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_are_those_that_were_quantised(tmp_path: pathlib.Path, kind: str) -> None:
    config, params, _ = gguf.load(write(tmp_path / "m.gguf", Kind[kind]), "float32")
    assert config == CONFIG

    def stored(name: str) -> np.ndarray:
        # Blocks run along a row, so quantising and then moving rows is moving and then quantising.
        tensor, chosen = make()[name], Kind[kind]
        if tensor.ndim == 1:
            return tensor
        return package.quants.dequantize(package.quants.quantize(tensor, chosen), chosen)

    expected = tree.flatten(hf.assemble(CONFIG, "float32", stored, lambda name: name))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path], path)


def test_the_converters_permutation_is_real_and_undone(tmp_path: pathlib.Path) -> None:
    tensor = make()[QUERY]
    assert not np.array_equal(as_converted(QUERY, tensor), tensor)
    _, params, _ = gguf.load(write(tmp_path / "m.gguf"), "float32")
    got = params["layers"]["attention"]["query"]["kernel"][1]
    np.testing.assert_array_equal(got, tensor.T.reshape(256, 4, 64))


def test_a_block_type_of_256_is_read(tmp_path: pathlib.Path) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (CONFIG.vocab_size, 210), np.uint8)
    raw[:, 208:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # each block's scale

    def edit(writer: Any) -> None:
        writer.add_tensor("token_embd.weight", raw, raw_dtype=Kind.Q6_K)

    path = write(tmp_path / "m.gguf", edit=edit, skip="model.embed_tokens.weight")
    _, params, _ = gguf.load(path, "float32")
    expected = package.quants.dequantize(raw, Kind.Q6_K)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)


def test_header_reads_as_with_the_packages_reader(tmp_path: pathlib.Path) -> None:
    def edit(writer: Any) -> None:
        writer.add_token_list(["a", "é", ""])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_token_types([1, 3, 6])
        writer.add_bool("some.flag", True)
        writer.add_float64("some.number", 1 / 3)

    path = write(tmp_path / "m.gguf", Kind.Q4_0, edit=edit)
    theirs, ours = package.GGUFReader(path), gguf_file.read(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(fields) == set(ours.metadata)
    for key, field in fields.items():
        np.testing.assert_array_equal(np.asarray(ours.metadata[key]), field.contents(), key)
    assert len(theirs.tensors) == len(ours.tensors)
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape.tolist()[::-1])
        np.testing.assert_array_equal(
            ours.tensors[tensor.name].raw, tensor.data.view(np.uint8).ravel(), tensor.name
        )


def rope_factors(factor: float, low: float, high: float) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency at a time."""
    factors = []
    for index in range(0, CONFIG.head_dim, 2):
        wavelength = 2 * np.pi * 10000.0 ** (index / CONFIG.head_dim)
        if wavelength < 8192 / high:
            factors.append(1.0)
        elif wavelength > 8192 / low:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_rope_factors_become_the_scaling_they_came_from(tmp_path: pathlib.Path) -> None:
    def edit(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", rope_factors(32.0, 1.0, 4.0))

    found = gguf.read_config(write(tmp_path / "m.gguf", edit=edit)).rope
    assert found == architecture.Rope(10000.0, architecture.Llama3(32.0, 1.0, 4.0, 8192))


def _other_rule(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", rope_factors(8.0, 1.0, 2.0))


def _dynamic(writer: Any) -> None:
    writer.add_string("llama.rope.scaling.type", "dynamic")


def _yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(package.RopeScalingType.YARN)


def _experts(writer: Any) -> None:
    writer.add_expert_count(8)


def _partial_rope(writer: Any) -> None:
    writer.add_key_length(32)


def _unknown_key(writer: Any) -> None:
    writer.add_float32("llama.logit_scale", 0.5)


def _bias(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(256, np.float32))


def _odd_tensor(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_q_norm.weight", np.zeros(64, np.float32))


def _not_finite(writer: Any) -> None:
    writer.add_tensor("output_norm.weight", np.full(256, np.inf, np.float32))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_other_rule, "rope_freqs.weight follows another rule"),
        (_dynamic, "llama.rope.scaling.type is 'dynamic': not implemented"),
        (_yarn, "llama.rope.scaling.factor is missing"),
        (_experts, "llama.expert_used_count is missing"),
        (_partial_rope, "llama.rope.dimension_count is 64, heads are of 32"),
        (_unknown_key, "llama.logit_scale is 0.5"),
        (_bias, "blk.1.attn_q.bias is missing"),
        (_odd_tensor, "blk.0.attn_q_norm.weight is no tensor of this architecture"),
        (_not_finite, "output_norm.weight: has a value that is not finite"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    tmp_path: pathlib.Path, edit: Edit, said: str
) -> None:
    skip = "model.norm.weight" if edit is _not_finite else ""
    assert said in refusal(write(tmp_path / "m.gguf", edit=edit, skip=skip))


def test_missing_tensors_and_other_architectures_are_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.gguf", skip=QUERY)
    assert "blk.1.attn_q.weight is missing" in refusal(path)
    path = write(tmp_path / "b.gguf", arch="mamba")
    assert "general.architecture is 'mamba'; implemented are llama, smollm3" in refusal(path)


def test_linear_scaling_is_honoured(tmp_path: pathlib.Path) -> None:
    def edit(writer: Any) -> None:
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    found = gguf.read_config(write(tmp_path / "m.gguf", edit=edit)).rope
    assert found == architecture.Rope(10000.0, architecture.Linear(4.0))


def test_every_cut_of_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    whole = write(tmp_path / "whole.gguf", Kind.Q8_0).read_bytes()
    path = tmp_path / "cut.gguf"
    dense = range(0, 4000, 37)
    for size in [*dense, *range(4000, len(whole), 40_000), len(whole) - 40]:
        path.write_bytes(whole[:size])
        refusal(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "not a GGUF file" in refusal(path)


def test_a_damaged_header_never_ends_in_anything_but_a_user_error(tmp_path: pathlib.Path) -> None:
    def edit(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b"])

    whole = write(tmp_path / "whole.gguf", Kind.Q8_0, edit=edit).read_bytes()
    path, rng = tmp_path / "damaged.gguf", random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(2600)] = rng.randrange(256)
        path.write_bytes(damaged)
        for read in (lambda: gguf.load(path, "float32"), lambda: gguf.tokenizer(path)):
            try:
                read()
            except errors.UserError:
                refused += 1
    assert refused > 200


def vocabulary(pre: str | None, model: str = "gpt2", **more: Any) -> Edit:
    def edit(writer: Any) -> None:
        letters = ["<s>", "</s>", *"0123456789ĠĊhi!", "12", "123", "Ġhi", "hi", "ĊĊ", "!Ċ"]
        kinds = [3, 3, *[1] * (len(letters) - 2)]
        writer.add_tokenizer_model(model)
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(letters)
        writer.add_token_types(kinds)
        writer.add_token_merges(["1 2", "12 3", "h i", "Ġ hi", "Ċ Ċ", "! Ċ"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for key, value in more.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)

    return edit


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["123", "4", "Ġhi", "Ċ", "Ċ", "hi", "!", "Ċ"]),
        ("smollm", ["1", "2", "3", "4", "Ġhi", "Ċ", "Ċ", "hi", "!", "Ċ"]),
        ("qwen2", ["1", "2", "3", "4", "Ġhi", "ĊĊ", "hi", "!Ċ"]),
        ("llama-bpe", ["123", "4", "Ġhi", "ĊĊ", "hi", "!Ċ"]),
    ],
)
def test_each_pre_tokenizer_cuts_numbers_and_lines_its_way(
    tmp_path: pathlib.Path, pre: str, pieces: list[str]
) -> None:
    pytest.importorskip("transformers")
    found = gguf.tokenizer(write(tmp_path / "m.gguf", edit=vocabulary(pre)))
    text = "1234 hi\n\nhi!\n"
    assert found.tokenize(text) == pieces
    assert found.decode(found(text, add_special_tokens=False).input_ids) == text
    assert found.tokenize("hi</s>") == ["hi", "</s>"]


def test_beginning_and_end_are_marked_as_the_file_says(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    cases = [
        ("smollm", {}, "hi"),
        ("llama-bpe", {}, "<s>hi"),
        ("llama-bpe", {"add_bos_token": False}, "hi"),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, "<s>hi</s>"),
    ]
    for pre, more, expected in cases:
        found = gguf.tokenizer(write(tmp_path / "m.gguf", edit=vocabulary(pre, **more)))
        assert found.decode(found("hi").input_ids) == expected
        assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", None)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (vocabulary("default"), "tokenizer.ggml.pre is 'default'"),
        (vocabulary(None), "tokenizer.ggml.pre is None"),
        (vocabulary("smollm", model="bert"), "tokenizer.ggml.model is 'bert'"),
        (vocabulary(None, model="llama"), "lacks <0x00>"),
        (lambda writer: None, "has no tokenizer"),
    ],
)
def test_tokenizers_without_a_known_rule_are_refused(
    tmp_path: pathlib.Path, edit: Edit, said: str
) -> None:
    with pytest.raises(errors.UserError) as caught:
        gguf.tokenizer(write(tmp_path / "m.gguf", edit=edit))
    assert said in str(caught.value)


def sentencepiece(shared: pathlib.Path) -> tuple[Edit, dict[str, int]]:
    """The vocabulary of a real model whose own tokenizer.json is at hand."""
    folder = shared / "stories260K" / "hf"
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.get)

    def edit(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 259 + [float(-i) for i in range(len(pieces) - 259)])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return edit, vocab


def merged(text: str, vocab: dict[str, int]) -> list[str]:
    """Sentencepiece's BPE as defined: join the pair whose union scores best, the leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(pieces)]
        known = [(vocab[pair], at) for at, pair in enumerate(pairs) if pair in vocab]
        if not known:
            return pieces
        at = min(known)[1]
        pieces[at : at + 2] = [pairs[at]]


def test_sentencepiece_gives_the_models_own_ids(
    tmp_path: pathlib.Path, shared: pathlib.Path
) -> None:
    pytest.importorskip("transformers")
    edit, vocab = sentencepiece(shared)
    ours = gguf.tokenizer(write(tmp_path / "m.gguf", edit=edit))
    theirs = hf.tokenizer(shared / "stories260K" / "hf")
    rng = random.Random(0)
    text = "Once upon a time, Lily's mom said: \"Don't!\"  They saw a big,\n red ball. café 日本 😀"
    samples = [text, "", " a", *["".join(rng.choices("theandow  s,.", k=40)) for _ in range(200)]]
    for sample in samples:
        assert ours(sample).input_ids == theirs(sample).input_ids, sample
        assert ours.decode(ours(sample).input_ids, skip_special_tokens=True) == sample
    for sample in samples[3:]:
        assert ours.tokenize(sample) == merged(sample, vocab), sample
    assert ours("a").input_ids[0] == ours.bos_token_id


def test_real_tokenizer_gives_the_golden_ids(
    smollm2_gguf: pathlib.Path, shared: pathlib.Path
) -> None:
    pytest.importorskip("transformers")
    found = gguf.tokenizer(smollm2_gguf)
    golden = json.loads((shared / "golden" / "real" / "generation_fp32.json").read_text())
    chats = [(chat["messages"], chat["ids"]) for chat in golden["chat_template"]]
    for sample in golden["greedy"]:
        chats.append(([{"role": "user", "content": sample["prompt"]}], sample["prompt_ids"]))
        assert found.decode(sample["new_ids"]) == sample["text"]
    for messages, ids in chats:
        got = found.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert got == ids, messages
    assert found.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    assert (found.eos_token_id, found.pad_token_id, len(found)) == (2, 2, 49152)


def test_real_weights_are_those_behind_the_goldens(
    smollm2_gguf: pathlib.Path, shared: pathlib.Path
) -> None:
    config, params, _ = gguf.load(smollm2_gguf, "float32")
    assert config == families.preset("smollm2-135m")
    golden = shared / "golden" / "real"
    ids = np.load(golden / "model_batch.npz")["input_ids"][0]
    hidden = np.load(golden / "model_out_fp32.npz")["hidden_row0"]
    np.testing.assert_array_equal(params["embed"]["embedding"][ids], hidden[0])
