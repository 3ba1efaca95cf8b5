# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that knows more tokens than the model has embeddings, as Gemma 3's: it loads, and their ids go nowhere."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import transformers

from jft import config, errors, generate, jobs, models
from jft.data import encoding, load, tokenising

TOKEN = "<image_soft_token>"


@pytest.fixture(scope="module")
def model(
    tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, models.Model]:
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("ids") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([TOKEN])
    tokenizer.save_pretrained(folder)
    found = models.load(str(folder))
    assert len(found.tokenizer) == found.config.vocab_size + 1 == 305
    return folder, found


def write(path: pathlib.Path, *prompts: str) -> str:
    rows = [{"prompt": prompt, "response": "hello"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SAID = r'{}:row 3: token 304 \("<image_soft_token>"\) is not one of the model\'s 304 embedding rows'


@pytest.mark.parametrize("spoilt", ["train", "valid", "test"])
def test_a_row_with_such_a_token_is_refused(
    model: tuple[pathlib.Path, models.Model], tmp_path: pathlib.Path, spoilt: str
) -> None:
    tokenizer = model[1].tokenizer
    files = {
        name: write(tmp_path / f"{name}.jsonl", f"a {name}", f"b {name}")
        for name in ("train", "valid", "test")
    }
    good = load.load(load.Source(**files), tokenizer, seed=0, vocab_size=304)
    assert len(good.train[0]) == len(good.valid) == len(good.test_rows) == 2
    write(tmp_path / f"{spoilt}.jsonl", f"a {spoilt}", f"b {spoilt}", f"see {TOKEN}")
    with pytest.raises(errors.UserError, match=SAID.format(files[spoilt])):
        load.load(load.Source(**files), tokenizer, seed=0, vocab_size=304)
    load.load(load.Source(**files), tokenizer, seed=0, vocab_size=305)


def test_a_row_that_is_left_out_does_no_harm(
    model: tuple[pathlib.Path, models.Model], tmp_path: pathlib.Path
) -> None:
    path = write(tmp_path / "train.jsonl", "a", "b", "the user " * 40 + TOKEN)
    source = load.Source(path, valid_fraction=0.0, max_length=32, overlength="drop")
    found = load.load(source, model[1].tokenizer, seed=0, vocab_size=304)
    assert len(found.train[0]) == 2


def test_a_run_is_refused_before_its_first_step(
    model: tuple[pathlib.Path, models.Model], tmp_path: pathlib.Path
) -> None:
    c = config.base()
    c.model.path, c.run_dir, c.data.valid_fraction = str(model[0]), str(tmp_path / "run"), 0.0
    c.data.train = write(tmp_path / "train.jsonl", "a", "b", TOKEN)
    c.data.max_length, c.batch_size, c.steps = 64, 2, 2
    with pytest.raises(errors.UserError, match=SAID.format(c.data.train)):
        jobs.prepare(c, tmp_path / "run")


def test_a_prompt_with_such_a_token_is_refused(model: tuple[pathlib.Path, models.Model]) -> None:
    _, found = model
    generator = generate.Generator(found)
    turns = ["hello", f"see {TOKEN}"]
    prompts = [
        encoding.prompt_tokens(found.tokenizer, [{"role": "user", "content": turn}])
        for turn in turns
    ]
    said = r"prompt 2: token 304 .* is not one of the model's 304 embedding rows"
    with pytest.raises(errors.UserError, match=said):
        generator.batch(prompts, generate.Sampling(max_new_tokens=2))
    with pytest.raises(errors.UserError, match="prompt 1: token 304"):
        next(generator.stream(prompts[1], generate.Sampling(max_new_tokens=2)))


def test_the_last_id_of_the_embedding_is_one(model: tuple[pathlib.Path, models.Model]) -> None:
    _, found = model
    tokenising.check_ids(np.array([0, 303], np.int32), 304, found.tokenizer, "f:row 1")
    tokenising.check_ids([], 304, found.tokenizer, "f:row 1")
    with pytest.raises(errors.UserError, match="f:row 1: token 303"):
        tokenising.check_ids([5, 303, 2], 303, found.tokenizer, "f:row 1")
