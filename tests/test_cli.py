# SPDX-License-Identifier: Apache-2.0
"""The command: help for every verb, `jft plan` against published sizes, `jft generate` without a run and for files."""

import json
import pathlib
from typing import Any

import jax
import pytest

from jft import answers, cli, generate, lora, models, plan, tree
from jft.data import encoding
from jft.models import architecture, decoder, export, families, hf

SYSTEM = "be brief"


def jft(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("jft: ")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"\n  jft {verb} --" in said and "--json" in said
    assert verb in jft(capsys)


# ---- plan

# As the models' cards and papers have them: parameters, and those that a token goes through.
PUBLISHED = {
    "llama3.1-8b": (8_030_261_248, 8_030_261_248),
    "gpt2": (124_439_808, 124_439_808),
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "qwen3-30b-a3b": (30.5e9, 3.3e9),
    "gpt-oss-20b": (20.9e9, None),  # 3.6e9 without the embedding, which its card leaves out
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_counts_are_the_published_ones(preset: str, capsys: Any) -> None:
    found = json.loads(jft(capsys, "plan", f"--model={preset}", "--json"))
    total, active = PUBLISHED[preset]
    assert found["parameters"] == pytest.approx(total, rel=0 if isinstance(total, int) else 0.005)
    if active:
        tolerance = 0 if isinstance(active, int) else 0.02  # as many digits as the card has
        assert found["active_parameters"] == pytest.approx(active, rel=tolerance)
    else:
        without = found["active_parameters"] - found["by_kind"]["embedding"]
        assert without == pytest.approx(3.6e9, rel=0.01)


@pytest.mark.parametrize("preset", sorted(families.PRESETS))
def test_every_parameter_of_every_preset_is_of_a_kind(preset: str) -> None:
    found = plan.plan(preset, rank=8)
    assert sum(found["by_kind"].values()) == found["parameters"]
    assert found["bytes"]["bfloat16"] * 2 == found["bytes"]["float32"] == 4 * found["parameters"]
    assert json.loads(json.dumps(found))["family"] == families.preset(preset).family
    assert plan.render(found).count("\n") >= 5


def test_what_lora_trains_is_what_it_makes() -> None:
    for preset in ("smollm2-135m", "qwen3-30b-a3b", "phi3-mini-4k"):
        found = plan.plan(preset, rank=4)["lora"]
        spec = lora.Spec(rank=4, targets=found["targets"], layouts=architecture.LAYOUTS)
        shapes = decoder.shapes(families.preset(preset))
        made = jax.eval_shape(lambda s=spec, p=shapes: lora.init(s, p, key=jax.random.key(0)))
        assert tree.size(made) == found["trainable"]


def test_a_plan_needs_no_weights(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    wanted = tree.size(models.load(str(tiny_model)).params)
    for name in (tmp_path, tmp_path / "config.json"):
        lines = jft(capsys, "plan", f"--model={name}").splitlines()
        (total,) = [line for line in lines if line.startswith("total")]
        assert f"{wanted:,}" in total and "the head is the embedding" in lines


def test_a_hub_name_is_planned_from_its_configuration_alone(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert "llama" in jft(capsys, "plan", "--model=owner/name", "--revision=v1")
    assert asked["allow_patterns"] == ["config.json"] and asked["revision"] == "v1"


# ---- generate


def write_rows(path: pathlib.Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--prompts={path}"


def test_a_file_of_prompts_is_answered_row_by_row(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    turns = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "green"},
        {"role": "user", "content": "blue " * 20},
    ]
    rows = [
        {"prompt": "one", "id": 7},
        {"messages": turns, "tags": ["x"]},
        {"prompt": "the user asks two " * 3, "system": "be loud"},
        {"prompt": "three"},
        {"prompt": "four"},
    ]
    model = models.load(str(tiny_model))
    generator, sampling = generate.Generator(model), generate.Sampling(max_new_tokens=5)
    wanted = []
    for row in rows:
        asked = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        prompt = encoding.prompt_tokens(model.tokenizer, asked, system=row.get("system", SYSTEM))
        wanted.append("".join(generator.stream_text(prompt, sampling)))
    prompts, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    flags = [f"--model={tiny_model}", prompts, "--max_new_tokens=5", "--batch_size=2"]
    said = jft(capsys, "generate", *flags, f"--system={SYSTEM}", f"--out={out}", "--json")
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert got == [row | {"response": text} for row, text in zip(rows, wanted, strict=True)]
    assert json.loads(said)["rows"] == 5 and json.loads(said)["out"] == str(out)
    assert len(set(wanted)) > 1 and 0 <= json.loads(said)["cut"] <= 5


def test_plain_text_is_continued_without_a_template(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    config, params, _ = hf.load(tiny_model, "float32")
    words = hf.tokenizer(tiny_model)
    words.chat_template = None
    export.save(tmp_path / "base", config, params, words)
    base = f"--model={tmp_path / 'base'}"
    assert "has no chat template" in refusal(capsys, "generate", base, "--prompt=red")
    assert "--raw continues the prompt" in refusal(capsys, "generate", base, "--prompt=red")
    model = models.load(str(tmp_path / "base"))
    tokens = words("the user", add_special_tokens=False)["input_ids"]
    (wanted,) = generate.Generator(model).batch([tokens], generate.Sampling(max_new_tokens=6))
    flags = [base, "--raw", "--max_new_tokens=6"]
    text = words.decode(wanted)
    assert jft(capsys, "generate", *flags, "--prompt=the user") == text + "\n"
    many = write_rows(tmp_path / "in.jsonl", {"prompt": "the user"})
    assert json.loads(jft(capsys, "generate", *flags, many))["response"] == text


def test_the_token_that_begins_texts_is_put_once() -> None:
    class Words:
        bos_token_id = 1

        def __init__(self, before: list[int], after: list[int]):
            self.before, self.after = before, after

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            ids = [1] if text == "<s>" else [7, 8]
            return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}

    assert answers.plain_tokens(Words([1], []), "red") == [1, 7, 8]
    assert answers.plain_tokens(Words([], [2]), "red") == [7, 8]  # nothing follows an end token
    assert answers.plain_tokens(Words([1], []), "<s>") == [1]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": ""}, "row 2: prompt is empty"),
        ({"prompt": 3}, "row 2: prompt is a number (3), not text"),
        ({"text": "a"}, "row 2: has neither of 'prompt' and 'messages'"),
        ({"prompt": "a", "messages": []}, "row 2: has both of"),
        ({"messages": []}, "row 2: messages is"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last is the user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "row 2: message 1 is no"),
        ({"prompt": "a", "response": "b"}, "row 2: has a field 'response' already"),
        ({"prompt": "\ud800"}, "row 2: prompt holds half of a surrogate pair"),
        (["a"], "row 2: holds a list of 1, not an object"),
    ],
)
def test_rows_that_can_not_be_answered_are_named(
    row: Any, told: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    """Before a model is loaded: there is none."""
    prompts = write_rows(tmp_path / "in.jsonl", {"prompt": "a"}, row)
    assert told in refusal(capsys, "generate", "--model=./none", prompts)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "one of the arguments --run --model is required"),
        (["--run=a", "--model=b"], "not allowed with argument"),
        (["--model=b", "--prompt=a", "--prompts=c"], "give one of them"),
        (["--model=b", "--out=c"], "--out is of --prompts=FILE"),
        (["--model=b", "--batch_size=2"], "--batch_size is of --prompts=FILE"),
        (["--model=b", "--prompts={prompts}", "--batch_size=0"], "--batch_size=0: it must be 1"),
        (["--model=b", "--json"], "--json needs --prompt or --prompts"),
        (["--model=b", "--raw", "--system=a"], "--system has no place in --raw text"),
        (["--run=b", "--dtype=bfloat16"], "--revision and --dtype are of --model"),
        (["--model=./b", "--prompts={prompts}", "--out={prompts}"], "is the file of prompts"),
        (["--model=./b", "--prompts=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model={model}", "--prompt=a", "--adapter={model}"], "it holds a whole model"),
        (["--model={model}", "--prompt=a", "--dtype=int8"], "int8"),
        (["--model={model}", "--prompts={prompts}", "--max_new_tokens=250"], "row 1: "),
    ],
)
def test_flags_without_meaning_are_told(
    flags: list[str], told: str, tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    prompts = tmp_path / "in.jsonl"
    write_rows(prompts, {"prompt": "red"})
    places = {"model": tiny_model, "prompts": prompts}
    capsys.readouterr()
    assert cli.main(["generate", *(flag.format(**places) for flag in flags)]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--model"),
        (["--model=llama3.1-8"], "no preset 'llama3.1-8'; near it: llama3.1-8b"),
        (["--model=gpt2", "--revision=main"], "a preset has no revision"),
        (["--model=gpt2", "--rank=0"], "lora.rank=0"),
        (["--model=./nowhere"], "no such file or folder"),
        (["--model={file}"], "cannot be read"),
    ],
)
def test_plans_of_nothing_are_refused(
    flags: list[str], told: str, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    file = tmp_path / "config.json"
    file.write_text("{")
    assert told in refusal(capsys, "plan", *(flag.format(file=file) for flag in flags))
