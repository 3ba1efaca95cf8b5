# SPDX-License-Identifier: Apache-2.0
"""The verbs export, import and merge: what is written computes what was there, and what does not fit is refused."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jft import cli, lora, models, runs, sources, tree
from jft.lora import peft, spec
from jft.models import architecture, export, hf, resolve

TARGETS = r"layers/.*/(query|out|gate|down)/kernel"
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}!
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant!
{% endif %}"""


def make_adapter(
    folder: pathlib.Path,
    base: pathlib.Path,
    size: float = 0.3,
    seed: int = 0,
    name: str | None = None,
) -> lora.Adapters:
    """An adapter that changes the model, in PEFT's format, and itself."""
    model, rng, drawn = models.load(str(base)), np.random.default_rng(seed), {}
    wanted = lora.Spec(rank=2, alpha=4, targets=TARGETS, layouts=architecture.LAYOUTS)
    for path, layout in spec.select(wanted, model.params).items():
        leaf = tree.flatten(model.params)[path]
        a, b, _ = (rng.standard_normal(x, np.float32) for x in spec.shapes(layout, leaf.shape, 2))
        drawn[path] = lora.Factors(0.3 * a, size * b, 2.0, layout)
    peft.save(folder, drawn, model.module_names, base_name=str(base) if name is None else name)
    return drawn


def make_run(run: pathlib.Path, base: pathlib.Path, **fields: Any) -> pathlib.Path:
    """A run's folder with best/ and last/, which are different adapters."""
    fingerprint = models.load(str(base)).fingerprint
    for seed, which in enumerate(("best", "last")):
        make_adapter(run / which, base, seed=seed)
        said = {f.name: "" for f in dataclasses.fields(runs.Sidecar)} | {
            "kind": "lora",
            "base": str(base),
            "dtype": "float32",
            "fingerprint": fingerprint,
            "step": 1,
            "scores": {},
            "training": {},
            "files": {},
        }
        runs.write_json(run / which / "jft.json", dataclasses.asdict(runs.Sidecar(**said | fields)))
    return run


def jft(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def logits(folder: pathlib.Path, adapters: Any = None) -> np.ndarray:
    model = models.load(str(folder))
    tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 17))
    apply = jax.jit(lora.transform(model.apply))
    return np.asarray(apply(model.params, adapters or {}, tokens_BT))


@pytest.mark.parametrize("with_base", [True, False])
def test_a_merged_model_computes_what_base_and_adapter_do(
    with_base: bool, tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    adapters = make_adapter(tmp_path / "adapter", tiny_model, name="" if with_base else None)
    flags = [f"--model={tiny_model}"] if with_base else []
    out = tmp_path / "merged"
    found = jft(capsys, "merge", f"--adapter={tmp_path / 'adapter'}", f"--out={out}", *flags)
    assert found["survival"].keys() == adapters.keys()
    assert all(s["cosine"] > 0.999 for s in found["survival"].values())
    wanted = logits(tiny_model, adapters)
    assert np.abs(wanted - logits(tiny_model)).max() > 0.1
    # Logits of the order of 1 through two layers, in float32, with the products in another order.
    np.testing.assert_allclose(logits(out), wanted, atol=2e-5)
    record = json.loads((out / "jft.json").read_text())
    assert record["source"] == str(tiny_model) and record["adapter"] == str(tmp_path / "adapter")
    assert record["fingerprint"] == found["fingerprint"] == models.load(str(out)).fingerprint


def test_export_of_a_run_is_the_merge_of_its_adapter(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    run = make_run(tmp_path / "run", tiny_model, system="be red", chat_template=TEMPLATE)
    prints = {}
    for which in ("best", "last"):
        flags = [f"--run={run}", f"--adapter={which}", f"--out={tmp_path / which}"]
        prints[which] = jft(capsys, "export", *flags)["fingerprint"]
        merged = jft(capsys, "merge", f"--adapter={run / which}", f"--out={tmp_path / 'm'}")
        assert merged["fingerprint"] == prints[which]
    assert prints["best"] != prints["last"]
    assert hf.tokenizer(tmp_path / "best").chat_template == TEMPLATE
    said = {}
    for name, flag in (("run", f"--run={run}"), ("model", f"--model={tmp_path / 'best'}")):
        capsys.readouterr()
        assert cli.main(["generate", flag, "--prompt=the user asks", "--max_new_tokens=6"]) == 0
        said[name] = capsys.readouterr()
        # The system message of training, which jft.json keeps.
        assert "system message: be red" in said[name].err
    assert said["model"].out == said["run"].out
    assert "is a model, no run" in refusal(capsys, "generate", f"--run={tmp_path / 'best'}")


def test_a_fully_trained_result_is_exported_as_it_is(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    shutil.copytree(tiny_model, tmp_path / "run" / "best")
    make_run(tmp_path / "other", tiny_model, kind="full", system="be red")
    shutil.copy(tmp_path / "other/best/jft.json", tmp_path / "run/best/jft.json")
    found = jft(capsys, "export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    assert found["fingerprint"] == models.load(str(tiny_model)).fingerprint
    assert found["system"] == "be red" and "survival" not in found
    best = tmp_path / "run" / "best"
    said = refusal(capsys, "export", f"--model={tiny_model}", f"--out={best}")
    assert "is a run's result" in said
    assert "is what is read" in refusal(
        capsys, "export", f"--run={best}", f"--out={best}", "--force"
    )


def test_an_update_that_rounding_turns_elsewhere_is_refused(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    make_adapter(tmp_path / "adapter", tiny_model, size=1e-4)
    flags = ["merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
    said = refusal(capsys, *flags, "--dtype=bfloat16")
    assert "rounding to bfloat16 leaves a cosine of" in said and "dtype=float32" in said
    assert not (tmp_path / "out").exists()
    found = jft(capsys, *flags, "--dtype=bfloat16", "--min_cosine=0")
    assert found["dtype"] == "bfloat16"
    assert min(s["cosine"] for s in found["survival"].values()) < 0.9
    assert all(s["cosine"] > 0.99 for s in jft(capsys, *flags)["survival"].values())


def test_what_survives_is_printed_for_each_kind(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    adapters = make_adapter(tmp_path / "adapter", tiny_model)
    capsys.readouterr()
    assert (
        cli.main(["merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    for path in adapters:
        (line,) = [line for line in lines if line.split()[0] == path]
        assert line.endswith("100.0 %  1.0000")
    assert any(line.startswith("wrote") and str(tmp_path / "out") in line for line in lines)


def test_another_base_than_that_of_training_is_refused(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    run = make_run(tmp_path / "run", tiny_model)
    config, params, _ = hf.load(tiny_model, "float32")
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 2
    export.save(tmp_path / "other", config, params, hf.tokenizer(tiny_model))
    flags = [
        "merge",
        f"--adapter={run}",
        f"--out={tmp_path / 'out'}",
        f"--model={tmp_path / 'other'}",
    ]
    said = refusal(capsys, *flags)
    assert "trained on" in said and "--force uses it all the same" in said
    assert jft(capsys, *flags, "--force")["source"] == str(tmp_path / "other")
    flags = ["generate", f"--adapter={run}", f"--model={tmp_path / 'other'}", "--prompt=red"]
    assert "--force uses it all the same" in refusal(capsys, *flags)


def test_an_adapter_of_a_tied_head_is_refused(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    make_adapter(tmp_path / "adapter", tiny_model)
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"target_modules": [*said["target_modules"], "lm_head"]}))
    said = refusal(
        capsys, "merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"
    )
    assert "its embeddings are tied" in said


def test_an_import_is_the_source_bit_for_bit(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    """Each parameter in its own float type, so that an adapter of the source fits the import."""
    config, params, _ = hf.load(tiny_model, "float32")
    leaves = tree.flatten(params)
    kernels = {k: x.astype(ml_dtypes.bfloat16) for k, x in leaves.items() if "norm" not in k}
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    words = hf.tokenizer(tiny_model)
    mixed = tree.unflatten(leaves | kernels)
    before = export.save(snapshot, config, mixed, words, max_shard_size=9000)
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    flags = ["import", "--model=owner/name", "--revision=main", f"--out={tmp_path / 'out'}"]
    found = jft(capsys, *flags)
    assert (asked["name"], asked["revision"]) == ("owner/name", "main")
    assert found["fingerprint"] == found["source_fingerprint"] == before.fingerprint
    assert found["revision"] == commit and found["parameters"] == tree.size(params)
    assert found["config"]["d_model"] == config.d_model
    record = json.loads((tmp_path / "out" / "jft.json").read_text())
    assert (record["source"], record["revision"]) == ("owner/name", commit)
    wide = jft(capsys, *flags, "--dtype=float32")
    assert wide["dtype"] == "float32" and wide["fingerprint"] != before.fingerprint
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    assert f"owner/name at {commit}" in said and "d_model" in said


def test_floats_of_a_gguf_file_keep_their_type(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    for module in ("gguf_export", "gguf_vocabulary"):
        pytest.importorskip(f"jft.models.{module}")
    half = jft(
        capsys, "export", f"--model={tiny_model}", f"--out={tmp_path / 'half'}", "--dtype=bfloat16"
    )
    for dtype in ("bfloat16", "q8_0"):
        flags = [
            f"--model={tmp_path / 'half'}",
            f"--out={tmp_path / dtype}.gguf",
            f"--dtype={dtype}",
        ]
        assert jft(capsys, "export", *flags)["format"] == "gguf"
        flags = ["import", f"--model={tmp_path / dtype}.gguf", f"--out={tmp_path / dtype}"]
        found = jft(capsys, *flags)
        # The converter's float32 norms were bfloat16 before.
        assert (found["fingerprint"] == half["fingerprint"]) == (dtype == "bfloat16")
        assert found["dtype"] == ("bfloat16" if dtype == "bfloat16" else "float32")
    out = tmp_path / "q8_0.gguf"
    assert "is there already" in refusal(capsys, "export", f"--model={tiny_model}", f"--out={out}")


def test_floats_are_narrowed_only_where_that_loses_nothing() -> None:
    exact, not_exact = np.float32([1.5, -2.0]), np.float32([1.5, 1 / 3])
    assert sources._exact(exact, "bfloat16").dtype == ml_dtypes.bfloat16
    assert sources._exact(not_exact, "bfloat16").dtype == np.float32
    assert sources._exact(np.float32([1e6]), "float16").dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "--model={model}"], "--out"),
        (["export", "--out=x"], "give either --model or --run"),
        (["export", "--out=x", "--model={model}", "--run=y"], "give either --model or --run"),
        (["export", "--out=x", "--run=nowhere"], "nowhere: no such folder"),
        (["export", "--out=x", "--run=y", "--revision=main"], "--revision is of --model"),
        (["export", "--out=x", "--model={model}", "--adapter=best"], "--adapter is of a run"),
        (["export", "--out=x", "--run=y", "--adapter=z"], "--adapter=z: best or last"),
        (["export", "--out={model}", "--model={model}"], "is what is read"),
        (["export", "--out={full}", "--model={model}"], "is not empty"),
        (["export", "--out={full}.gguf", "--model={model}"], "is there already; --force replaces"),
        (["export", "--out=x", "--model={model}", "--dtype=int8"], "--dtype=int8: a folder has"),
        (["export", "--out=x", "--model={model}", "--dtype=q8_0"], "--dtype=q8_0: a folder has"),
        (["export", "--out=x", "--model={model}", "--format=onnx"], "--format=onnx: one of hf"),
        (["export", "--out=x", "--model={model}", "--max_shard_size=5XB"], "'5XB' is no size"),
        (["export", "--out=x", "--model={model}", "--revision=v1"], "has no revision 'v1'"),
        (["import", "--out=x"], "--model is missing"),
        (["import", "--out=x.gguf", "--model={model}"], "import writes a folder"),
        (["merge", "--out=x"], "--adapter"),
        (["merge", "--out=x", "--adapter=nowhere"], "there is no such folder"),
        (["merge", "--out=x", "--adapter={model}"], "it holds a whole model"),
        (["merge", "--out=x", "--adapter={baseless}"], "does not say which base"),
        (["merge", "--out=x", "--adapter={lost}"], "; --model names another"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    told: str,
    tiny_model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "full.gguf").touch()
    for name, base in (("baseless", None), ("lost", "./gone")):
        (tmp_path / name).mkdir()
        said = json.dumps({"base_model_name_or_path": base})
        (tmp_path / name / "adapter_config.json").write_text(said)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    places = {"model": tiny_model} | {k: tmp_path / k for k in ("full", "baseless", "lost")}
    said = refusal(capsys, *(argument.format(**places) for argument in arguments))
    assert said.startswith("jft: ") and told in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_embedded_model_has_no_revision(capsys: Any) -> None:
    (name,) = resolve.EMBEDDED
    said = refusal(capsys, "import", f"--model={name}", "--out=nowhere", "--revision=main")
    assert "comes in one revision only" in said


def test_float64_keeps_its_bits_and_is_not_merged_in_float32(
    tmp_path: pathlib.Path, tiny_model: pathlib.Path, capsys: Any
) -> None:
    with jax.enable_x64(True):
        config, params, _ = hf.load(tiny_model, "float64")
    params["final_norm"]["scale"] = np.asarray(params["final_norm"]["scale"]) + 1e-12
    written = export.save(tmp_path / "wide", config, params, hf.tokenizer(tiny_model))
    found = jft(capsys, "import", f"--model={tmp_path / 'wide'}", f"--out={tmp_path / 'out'}")
    assert found["dtype"] == "float64" and found["fingerprint"] == written.fingerprint
    make_adapter(tmp_path / "adapter", tiny_model)
    flags = [f"--adapter={tmp_path / 'adapter'}", f"--model={tmp_path / 'wide'}"]
    said = refusal(capsys, "merge", *flags, f"--out={tmp_path / 'merged'}")
    assert "is float64; merge with --dtype=float32" in said
