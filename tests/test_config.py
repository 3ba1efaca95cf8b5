# SPDX-License-Identifier: Apache-2.0
"""Configuration files and flags: what is wrong is told with its file, line or key, and the nearest right name."""

import pathlib

import pytest

from jft import cli, config, errors
from jft.models import families


def write(tmp_path: pathlib.Path, *body: str, head: str = "def get_config():") -> str:
    path = tmp_path / "mine.py"
    lines = ["from jft import config", head, *(f"    {line}" for line in body)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


BAD_FILES = {
    "typo": (("c = config.base()", "c.optim.learning_rat = 1.0", "return c"), r"line 4: .*rat"),
    "type": (("c = config.base()", "c.steps = 'many'", "return c"), r"line 4: TypeError"),
    "failure": (("return {}['a']",), r"line 3: KeyError: a"),
    "syntax": (("return (",), r"SyntaxError"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path: pathlib.Path, fault: str) -> None:
    body, told = BAD_FILES[fault]
    path = write(tmp_path, *body)
    with pytest.raises(errors.UserError, match=told) as caught:
        config.load(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_or_defines_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="nowhere.py: no such file"):
        config.load(str(tmp_path / "nowhere.py"))
    path = write(tmp_path, "pass", head="def configure():")
    with pytest.raises(errors.UserError, match="defines no get_config"):
        config.load(path)


def test_the_argument_reaches_get_config(tmp_path: pathlib.Path) -> None:
    body = ("c = config.base()", "c.model.path = arg", "return c")
    path = write(tmp_path, *body, head="def get_config(arg='a'):")
    assert config.load(path).model.path == "a"
    assert config.load(f"{path}:b").model.path == "b"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.learning_rate", "1e-4", 1e-4),
        ("steps", "12", 12),
        ("data.packing", "False", False),
        ("data.packing", "1", True),
        ("run_dir", "12", "12"),
    ],
)
def test_flags_take_the_keys_type(key: str, text: str, value: object) -> None:
    c = config.base()
    config.override(c, key, text)
    got = config.flatten(c)[key]
    assert got == value and type(got) is type(value)
    assert list(config.difference(c, config.base())) in ([key], [])


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        ("optim.learning_rat", "1", "did you mean --config.optim.learning_rate"),
        ("optim", "1", "group of keys"),
        ("steps", "1.5", "steps=1.5: int wanted"),
        ("data.packing", "maybe", "bool wanted"),
        ("optim.b1", "", "float wanted"),
    ],
)
def test_flags_that_do_not_fit_are_refused(key: str, text: str, told: str) -> None:
    with pytest.raises(errors.UserError, match=told):
        config.override(config.base(), key, text)


def test_unknown_missing_and_mistyped_keys_are_named() -> None:
    c = config.base().unlock()
    c.lora.ranks = 3
    with pytest.raises(errors.UserError, match="f: unknown key lora.ranks; did you mean lora.rank"):
        config.check_complete(c, "f")
    c = config.base().unlock()
    del c.lora.rank
    with pytest.raises(errors.UserError, match="f: key lora.rank is missing"):
        config.check_complete(c, "f")
    c = config.base().unlock()
    with c.ignore_type():
        c.steps = "5"
    with pytest.raises(errors.UserError, match="f: steps='5' should be int"):
        config.check_complete(c, "f")


def test_keys_that_do_not_change_the_numbers_exist() -> None:
    keys = config.flatten(config.base())
    for name in config.NOT_MATHEMATICS:
        assert any(key.startswith(name) for key in keys), f"{name} names no key"


def test_dry_run_tells_where_each_value_comes_from(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "c = config.base()", "c.steps = 7", "return c")
    flags = [f"--config={path}", "--config.optim.b1", "0.8", "--dry_run"]
    assert cli.main(["train", *flags]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["steps"] == ["7", path]
    assert lines["optim.b1"] == ["0.8", "flag"]
    assert lines["seed"] == ["0", "base()"]
    assert lines.keys() == config.flatten(config.base()).keys()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "did you mean `jft train`"),
        (["train"], "--config=FILE is missing"),
        (["train", "--config"], "--config needs a value"),
        (["generate"], "--run"),
        (["generate", "--run=nowhere"], "nowhere: no such folder"),
        (["generate", "--run=nowhere", "--temperature=-1"], "temperature=-1.0"),
        (["generate", "--run=nowhere", "--top_p=2"], "top_p=2.0"),
        (["generate", "--run=nowhere", "--colour=red"], "--colour=red"),
    ],
)
def test_a_bad_command_is_one_line_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jft: ") and told in line


def test_every_preset_of_the_general_configuration_is_a_model_that_is_known() -> None:
    path = pathlib.Path(__file__).parents[1] / "configs" / "sft.py"
    with pytest.raises(errors.UserError) as caught:
        config.load(f"{path}:none")
    presets = str(caught.value).split("one of ")[1].split(", ")
    assert len(presets) > 20
    for name in presets:
        loaded = config.load(f"{path}:{name}")
        config.check_complete(loaded, str(path))
        assert name in families.PRESETS and loaded.model.path
