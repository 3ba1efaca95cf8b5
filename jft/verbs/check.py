# SPDX-License-Identifier: Apache-2.0
"""`jft check`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jft import errors
from jft.verbs import parsing

if TYPE_CHECKING:
    from jft import check

HELP = """\
Tells what is in data before it is trained on: rows, lengths, what is wrong, and which tokens would be trained.

examples:
  jft check data.jsonl
  jft check train.csv --valid=test.csv --columns.prompt=text --columns.response=category
  jft check data.jsonl --tokenizer=smollm2-135m-instruct --max_length=1024 --show=3
  jft check data.jsonl --model=smollm2-135m-instruct --json
  jft check data.jsonl --fix=clean.jsonl
  jft check --config=configs/sft.py:smollm2-135m --config.data.train=data.jsonl

With --tokenizer rows are also counted in tokens, as training would see them; with --model, answers that do not seem to
belong to their prompts are found too. The exit code is 1 where an error is found, 0 with warnings and notes alone.
"""
ROLES = "prompt response messages system text chosen rejected label tools".split()
# What --config says itself, and where.
_OF_CONFIG = {
    "files": "data.train",
    "valid": "data.valid",
    "tokenizer": "model.path",
    "model": "model.path",
    "revision": "model.revision",
    "max_length": "data.max_length",
    "overlength": "data.overlength",
    "train_on": "data.train_on",
    "system": "data.system",
    "chat_template": "data.chat_template",
    "header": "data.header",
    "separator": "data.separator",
    **{f"columns.{role}": f"data.columns.{role}" for role in ROLES},
}
_OF_ASKED = "tokenizer model revision max_length overlength train_on system chat_template".split()
_OF_TOKENS = ("max_length", "overlength", "train_on", "system", "chat_template", "show", "rows")


def run(arguments: list[str]) -> int:
    parser, said = _parser(), str
    if any(word.split("=")[0].startswith("--config") for word in arguments):
        config, _, rest = parsing.read_config(arguments)
        flags = vars(parser.parse_args(rest))
        asked = _from_config(parser, config, flags)
    else:
        flags = vars(parser.parse_args(arguments))
        asked = _from_flags(parser, flags)
        said = _as_flags
    from jft import check
    from jft.terminal import objects

    try:
        outcome = check.run(asked)
    except errors.UserError as error:
        raise errors.UserError(said(str(error))) from error
    outcome = _said(outcome, said)
    fixed = _fix(asked, outcome, flags["fix"]) if flags["fix"] else None
    if flags["json"]:
        described = objects.report(
            outcome.report, outcome.files, outcome.unused, outcome.shown, outcome.tokenizer
        )
        parsing.show(described | ({"fixed": fixed} if fixed else {}), "", True)
    else:
        _print(asked, outcome, fixed)
    return 1 if any(finding.severity == "error" for finding in outcome.report.findings) else 0


def _parser() -> parsing.Parser:
    parser = parsing.Parser("check", HELP)
    parser.add_argument("files", nargs="*", metavar="FILE", help="files, folders or Hub data sets")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="check what `jft train` would read")
    parser.add_argument("--valid", metavar="FILE", help="held-out rows: which leak into FILE?")
    for role in ROLES:
        parser.add_argument(f"--columns.{role}", metavar="NAME", help=f"the {role} column")
    parser.add_argument(
        "--header", help="false: a table's first line is a row; columns are 0, 1, ..."
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="where a text becomes prompt and response"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="a model's name; its weights aren't read"
    )
    parser.add_argument("--model", metavar="NAME", help="also compute its losses of the answers")
    parser.add_argument("--revision", help="of a Hub name: branch, tag or commit")
    parser.add_argument("--max_length", type=int, metavar="N", help="positions that a row may take")
    parser.add_argument("--overlength", help="of longer rows: error, drop, truncate_prompt, split")
    parser.add_argument("--train_on", help="assistant (default), last, weight or everything")
    parser.add_argument("--system", help="a system message for conversations that have none")
    parser.add_argument("--chat_template", metavar="FILE", help="in place of the tokenizer's")
    parser.add_argument("--outliers", type=int, metavar="N", help="answers to score; 500; 0 = none")
    parser.add_argument("--show", type=int, metavar="N", help="the first N rows, token by token")
    parser.add_argument("--rows", metavar="N,N,...", help="the rows of these numbers instead")
    parser.add_argument("--fix", metavar="OUT", help="write the data without what can be mended")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _from_flags(parser: parsing.Parser, flags: Mapping[str, Any]) -> "check.Asked":
    if not flags["files"]:
        parser.error("name a file, or a configuration with --config=FILE")
    if flags["tokenizer"] and flags["model"]:
        parser.error("give --tokenizer or --model: a model has its tokenizer")
    if flags["outliers"] is not None and not flags["model"]:
        parser.error("--outliers needs --model=NAME")
    for name in (*_OF_TOKENS, "revision"):
        if flags[name] is not None and not (flags["tokenizer"] or flags["model"]):
            parser.error(f"--{name} needs --tokenizer=NAME (or --model=NAME)")
    columns = {role: flags[f"columns.{role}"] or "" for role in ROLES}
    given = {name: flags[name] for name in _OF_ASKED if flags[name] is not None}
    return _asked(
        parser,
        flags,
        given,
        files=tuple(flags["files"]),
        valid=(flags["valid"],) if flags["valid"] else (),
        reading=_reading(columns, flags["header"] or "", flags["separator"] or ""),
    )


def _from_config(parser: parsing.Parser, config: Any, flags: Mapping[str, Any]) -> "check.Asked":
    """What `jft train` would read with this configuration, and the flags that are of a check alone."""
    for name, key in _OF_CONFIG.items():
        if flags[name]:
            parser.error(f"--config says what is read: --config.{key} instead of {_flag(name)}")
    data = config.data
    if not data.train:
        raise errors.UserError("data.train is not set: --config.data.train=FILE")
    own = ("max_length", "overlength", "train_on", "system", "chat_template")
    given = {name: data[name] for name in own}
    of = "model" if flags["outliers"] else "tokenizer"
    held_out = dict.fromkeys(_sources(data.valid) + _sources(data.test))
    return _asked(
        parser,
        flags,
        given | {of: config.model.path, "revision": config.model.revision},
        files=_sources(data.train),
        valid=tuple(held_out),
        reading=_reading(dict(data.columns), str(data.header), data.separator),
    )


def _as_flags(text: str) -> str:
    """A message of the library, which speaks of the configuration's keys, with this verb's flags instead."""
    return re.sub(r"\bdata\.(?=columns\.|" + "|".join(_OF_ASKED) + "|separator|header)", "--", text)


def _said(outcome: "check.Outcome", said: Callable[[str], str]) -> "check.Outcome":
    """The outcome with its findings' words put as the user would write them."""
    found = tuple(
        dataclasses.replace(f, message=said(f.message), advice=said(f.advice))
        for f in outcome.report.findings
    )
    report = dataclasses.replace(outcome.report, findings=found)
    return dataclasses.replace(outcome, report=report)


def _flag(name: str) -> str:
    return "FILE" if name == "files" else f"--{name}"


def _sources(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _asked(
    parser: parsing.Parser, flags: Mapping[str, Any], given: Mapping[str, Any], **others: Any
) -> "check.Asked":
    from jft import check
    from jft.data import fitting

    if given.get("overlength", "error") not in fitting.OVERLENGTH:
        parser.error(f"--overlength={given['overlength']}: one of {', '.join(fitting.OVERLENGTH)}")
    for name in ("max_length", "outliers", "show"):
        if (flags[name] or 0) < 0:
            parser.error(f"--{name}={flags[name]}: it must be 0 or more")
    if flags["fix"] and len(others["files"]) > 1:
        parser.error(f"--fix={flags['fix']}: takes one file at a time, not {len(others['files'])}")
    settings = dict(given)
    if flags["outliers"] is not None:
        settings["outliers"] = flags["outliers"]
    return check.Asked(
        **settings, **others, show=flags["show"] or 0, rows=_numbers(parser, flags["rows"])
    )


def _numbers(parser: parsing.Parser, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        parser.error(f"--rows={text}: numbers of rows, as in --rows=3,17")
    return tuple(int(word) for word in words)


def _reading(columns: Mapping[str, str], header: str, separator: str) -> Any:
    from jft.data import formats

    if header.lower() not in ("", "true", "false"):
        raise errors.UserError(f"--header={header}: true or false")
    return formats.Reading(
        columns={role: name for role, name in columns.items() if name},
        header=header.lower() != "false",
        separator=separator,
    )


def _fix(asked: "check.Asked", outcome: "check.Outcome", out: str) -> dict[str, Any]:
    from jft.data import fixing

    return fixing.fix(asked.files[0], asked.reading, outcome.report.findings, out)


def _print(asked: "check.Asked", outcome: "check.Outcome", fixed: Mapping[str, Any] | None) -> None:
    from jft import check
    from jft.terminal import pieces, report, screen, showing

    console = screen.standard_output()
    if outcome.shown:
        showing.print_legend(console)
        spelled = pieces.Pieces(outcome.tokenizer)
        for shown in outcome.shown:
            showing.print_shown(
                console,
                shown,
                spelled,
                several=len(outcome.files) > 1,
                max_length=asked.max_length,
            )
    quotes = check.quotes(asked, outcome.report.findings)
    report.print_report(console, outcome.report, outcome.files, outcome.unused, quotes)
    if fixed is not None:
        report.print_fixed(console, fixed)
