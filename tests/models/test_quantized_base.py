# SPDX-License-Identifier: Apache-2.0
"""A quantised base on disk and in use: loaded it is what was quantised; damage and mix-ups are refused by name."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jft import cli, config, convert, errors, jobs, loop, lora, models, runs, tree
from jft.lora import peft
from jft.models import architecture, decoder, export, hf, quantizing

pytestmark = pytest.mark.slow  # each kernel's quantisation is a program to compile
SETTINGS = quantizing.Settings("nf4", "int8")
UP = "layers/mlp/up/kernel"
FLAGS = ("--quantize=nf4", "--quantize_embeddings=int8")


def flags(*words: str) -> list[str]:
    return [*words, *FLAGS]


@pytest.fixture(scope="module")
def base(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny model's tokenizer with a decoder whose kernels have whole blocks."""
    folder = tmp_path_factory.mktemp("base") / "model"
    own = dataclasses.replace(hf.read_config(tiny_model), d_model=64, head_dim=16, d_ff=128)
    make(folder, own, hf.tokenizer(tiny_model), seed=0)
    return folder


def make(folder: pathlib.Path, own: architecture.Config, tokenizer: Any, seed: int) -> None:
    params = decoder.init(own, key=jax.random.key(seed), dtype="bfloat16")
    params["final_norm"]["scale"] += np.float32(1e-3)  # float32, beside bfloat16
    export.save(folder, own, params, tokenizer)


@pytest.fixture(scope="module")
def packed(base: pathlib.Path) -> pathlib.Path:
    folder = base.parent / "packed"
    assert cli.main(flags("export", f"--model={base}", f"--out={folder}")) == 0
    return folder


def load(folder: pathlib.Path, dtype: str = "float32", to: Any = SETTINGS) -> models.Model:
    return models.load(str(folder), dtype=dtype, quantize=to)


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_without_the_original_it_is_what_was_quantised(
    base: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path, dtype: str
) -> None:
    own = tmp_path / "alone"
    shutil.copytree(packed, own)
    found, want = load(own, dtype), load(base, dtype)
    same(found.params, want.params)
    assert (found.fingerprint, found.config) == (want.fingerprint, want.config)
    assert found.tokenizer.get_vocab() == want.tokenizer.get_vocab()
    likes = models.shapes(str(own), dtype=dtype, quantize=SETTINGS)
    assert jax.tree.structure(likes) == jax.tree.structure(found.params)
    assert tree.nbytes(likes) == tree.nbytes(found.params)


def test_in_several_files_and_again_the_same_bytes(
    base: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = flags("export", f"--model={base}", f"--out={tmp_path / 'm'}")
    assert cli.main([*words, "--max_shard_size=20KB"]) == 0
    assert len(list((tmp_path / "m").glob("quantized-*.safetensors"))) > 2
    same(load(tmp_path / "m").params, load(packed).params)
    assert cli.main(flags("export", f"--model={base}", f"--out={tmp_path / 'n'}")) == 0
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "n" / file.name).read_bytes(), file.name
    # A model that is written over it leaves nothing of it.
    assert cli.main(["export", f"--model={base}", f"--out={tmp_path / 'm'}"]) == 0
    assert not list((tmp_path / "m").glob("quantized*"))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(errors.UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("asked", ["none/none", "nf4/none", "int8/int8"])
def test_other_settings_are_refused(packed: pathlib.Path, base: pathlib.Path, asked: str) -> None:
    said = refusal(lambda: load(packed, to=quantizing.Settings(*asked.split("/"))))
    assert said.startswith(f"{packed}: holds a base with {SETTINGS}, not quantize=")
    assert said.endswith(f"give that, or the original, {base}")


File = pathlib.Path


def rewrite(folder: File, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "quantized.json"
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))


def weights(folder: File, change: Callable[[bytearray], Any]) -> None:
    path = folder / "quantized.safetensors"
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw) or raw)


def flip(raw: bytearray, name: str) -> None:
    """One bit in the middle of a tensor."""
    length = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + (start + stop) // 2] ^= 1


def renamed(raw: bytearray, old: str, new: str) -> bytes:
    assert len(old) == len(new) and old.encode() in raw
    return bytes(raw).replace(old.encode(), new.encode(), 1)


def from_other(folder: File) -> None:
    """The weights of another base of the same shape."""
    other = folder.parent / "other"
    make(other, hf.read_config(folder), hf.tokenizer(folder), seed=7)
    assert cli.main(flags("export", f"--model={other}", f"--out={folder.parent / 'theirs'}")) == 0
    shutil.copy(folder.parent / "theirs" / "quantized.safetensors", folder)


FAULTS: dict[str, tuple[Callable[[File], None], str]] = {
    "a flipped bit of codes": (
        lambda f: weights(f, lambda raw: flip(raw, f"{UP}.codes")),
        rf"quantized.safetensors: {UP}.codes: its bytes are not those that quantized.json",
    ),
    "a flipped bit of scales": (
        lambda f: weights(f, lambda raw: flip(raw, f"{UP}.scales.scales")),
        rf"quantized.safetensors: {UP}.scales.scales: its bytes are not those",
    ),
    "a flipped bit of a norm": (
        lambda f: weights(f, lambda raw: flip(raw, "layers/mlp_norm/scale")),
        "quantized.safetensors: layers/mlp_norm/scale: its bytes are not those",
    ),
    "cut short": (
        lambda f: weights(f, lambda raw: raw[:-7]),
        r"quantized.safetensors: .*: ends at byte \d+ of \d+: the file is cut short",
    ),
    "no file": (
        lambda f: (f / "quantized.safetensors").unlink(),
        "quantized.safetensors: is missing, and quantized.json names it",
    ),
    "another shape": (
        lambda f: weights(f, lambda raw: renamed(raw, "[2,32,128]", "[2,128,32]")),
        r"quantized.safetensors: layers/mlp/\w+/kernel.codes: U8 \[2, 128, 32\], quantized.json says U8 \[2, 32, 128\]",
    ),
    "another name": (
        lambda f: weights(f, lambda raw: renamed(raw, f"{UP}.codes", f"{UP}.coded")),
        f"quantized.safetensors: {UP}.codes is missing",
    ),
    "another fingerprint": (
        lambda f: rewrite(f, lambda r: r.update(fingerprint="sha256:0")),
        "quantized.json: has been changed since it was written",
    ),
    "another hash": (
        lambda f: rewrite(f, lambda r: r["tensors"][f"{UP}.codes"].update(sha256="0")),
        "quantized.json: has been changed since it was written",
    ),
    "another format": (
        lambda f: rewrite(f, lambda r: r.update(format=2)),
        "quantized.json: format 2, not 1",
    ),
    "another base's weights": (from_other, "its bytes are not those that quantized.json has"),
    "another config.json": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json")
            .read_text()
            .replace('"intermediate_size": 128', '"intermediate_size": 64')
        ),
        r"quantized.json: layers/mlp/down/kernel has shape \(2, 128, 64\), config.json says",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused(packed: File, tmp_path: File, fault: str) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    damage, said = FAULTS[fault]
    damage(folder)
    message = refusal(lambda: load(folder))
    assert message.startswith(str(folder))
    assert re.search(said, message), message


def test_what_can_not_be_written(base: File, packed: File, tmp_path: File) -> None:
    for out, model, to, said in (
        ("m.gguf", base, SETTINGS, "--quantize writes a folder"),
        ("m", base, quantizing.Settings("nf5"), "model.quantize='nf5': one of"),
        ("m", packed, SETTINGS, f"{packed}: holds a quantised base; give its original: {base}"),
        ("m", packed, quantizing.DENSE, f"{packed}: holds a quantised base"),
    ):
        target = convert.Target(tmp_path / out, quantize=to)
        assert said in refusal(lambda t=target, m=model: convert.export_model(t, str(m)))


def make_run(run: File, base: File, packed: bool, **training: Any) -> File:
    """A run with an adapter for the model itself, quantised while it was loaded, or for its folder."""
    model = models.load(str(base))
    wanted = lora.Spec(rank=2, alpha=4, targets=".*/kernel", layouts=architecture.LAYOUTS)
    drawn = lora.init(wanted, model.params, key=jax.random.key(1))
    drawn = jax.tree.map(lambda x: x + 0.01, drawn)
    name = str(base.parent / "packed" if packed else base)
    peft.save(run / "best", drawn, model.module_names, base_name=name)
    said = {f.name: "" for f in dataclasses.fields(runs.Sidecar)} | {
        "kind": "lora",
        "base": name,
        "dtype": "float32",
        "fingerprint": model.fingerprint,
        "step": 1,
        "scores": {},
        "files": {},
        "training": {"model": dict(zip(quantizing.KEYS, ("nf4", "int8"), strict=True))} | training,
    }
    runs.write_json(run / "best" / "jft.json", dataclasses.asdict(runs.Sidecar(**said)))
    return run


@pytest.mark.parametrize("from_packed", [False, True])
def test_a_run_is_opened_on_its_own_base_and_on_the_other(
    base: File, packed: File, tmp_path: File, from_packed: bool
) -> None:
    run = make_run(tmp_path / "run", base, from_packed)
    model, adapters, sidecar = runs.open_result(run / "best")
    same(model.params, load(base).params)
    assert adapters and sidecar.quantize == SETTINGS and not sidecar.other_base(SETTINGS)
    if not from_packed:
        dense, again, _ = runs.open_result(run / "best", quantize=quantizing.DENSE)
        assert tree.flatten(dense.params)[UP].shape == (2, 64, 128)
        same(again, adapters)
    note = sidecar.other_base(quantizing.DENSE)
    assert note == (
        f"the adapter was trained on {sidecar.base} with {SETTINGS}, and is used with {quantizing.DENSE}"
    )


def test_generate_says_which_base(base: File, packed: File, tmp_path: File, capsys: Any) -> None:
    run = make_run(tmp_path / "run", base, True)
    ask = ["--prompt=a", "--max_new_tokens=2", "--json"]

    def said(*words: str) -> list[str]:
        capsys.readouterr()
        assert cli.main(["generate", *words, *ask]) == 0
        return capsys.readouterr().err.splitlines()

    assert not [line for line in said(f"--run={run}") if "was trained on" in line]
    adapter = f"--adapter={run / 'best'}"
    notes = said(f"--model={base}", adapter)
    assert f"the adapter was trained on {packed} with {SETTINGS}, and is used with" in notes[0]


@pytest.mark.parametrize("from_packed", [False, True])
def test_a_merge_goes_into_the_original(
    base: File, packed: File, tmp_path: File, from_packed: bool
) -> None:
    run = make_run(tmp_path / "run", base, from_packed)
    plain = make_run(tmp_path / "plain", base, False, model={})
    for name, own in (("a", run), ("b", plain)):
        words = ["export", f"--run={own}", f"--out={tmp_path / name}", "--dtype=float32"]
        assert cli.main(words) == 0
    same(
        load(tmp_path / "a", to=quantizing.DENSE).params,
        load(tmp_path / "b", to=quantizing.DENSE).params,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"quantize": "nf4"},
            "model.quantize=nf4 keeps the base frozen: it needs an adapter (lora.rank above 0)",
        ),
        (
            {"quantize_embeddings": "int8"},
            "model.quantize_embeddings=int8 keeps the base frozen: it needs an adapter (lora.rank above 0)",
        ),
        ({"quantize": "q4"}, "model.quantize='q4': one of none, nf4, int4, int8"),
    ],
)
def test_training_every_weight_is_refused(changes: Any, said: str, tmp_path: File) -> None:
    c = config.base()
    c.lora.rank = 0
    c.model.update(changes)
    assert refusal(lambda: jobs.prepare(c, tmp_path)) == said


@pytest.mark.slow
def test_training_on_either_is_the_same(base: File, packed: File, tmp_path: File) -> None:
    """And an adapter of one fits the other: both have the original's fingerprint."""
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = []
    for place in (base, packed):
        c = config.base()
        c.model.path, c.data.train = str(place), str(tmp_path / "rows.jsonl")
        c.run_dir = str(tmp_path / place.name)
        c.model.update(dict(zip(quantizing.KEYS, ("nf4", "int8"), strict=True)))
        c.steps, c.batch_size, c.data.max_length, c.validate.samples = 2, 4, 64, 0
        results.append(loop.train(c))
    assert results[0]["tuned"] == results[1]["tuned"]
    own, other = (runs.open_result(pathlib.Path(r["result"])) for r in results)
    same(own[1], other[1])
    same(own[0].params, other[0].params)
    assert own[2].quantize == SETTINGS and own[2].fingerprint == other[2].fingerprint
