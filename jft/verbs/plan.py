# SPDX-License-Identifier: Apache-2.0
"""`jft plan`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jft import errors
from jft.verbs import parsing

HELP = """\
With --topology: compiles the training and the evaluation step of a configuration for devices that are not here, and tells
whether they fit, what they compute and send, how long a step takes at best and what it costs. Nothing is loaded; rows are
data.max_length long.
With --model alone: counts a model's parameters by kind, its bytes, and what LoRA would train.

examples:
  jft plan --config=configs/sft.py:llama3.1-8b --topology=v5e:4x4 --config.batch_size=16 --config.remat=full
  jft plan --config=configs/sft.py:llama3.1-8b --topology=v5e:4x4 --config.batch_size=16 --search --price=1.2
  jft plan --config=configs/sft.py:llama3.1-8b --topology=v5p --smallest --config.remat=full
  jft plan --config=configs/sft.py --config.model.path=qwen3-8b --topology=h100:8 --json
  jft plan --model=Qwen/Qwen3-30B-A3B --rank=32 --json
"""


def run(arguments: list[str]) -> int:
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not any(word.split("=")[0] == "--config" for word in arguments):
        return _count(parser.parse_args(arguments))
    config, origins, rest = parsing.read_config(arguments)
    flags = parser.parse_args(rest)
    if flags.model:
        raise errors.UserError("--model counts a model; with --config it is --config.model.path")
    if not flags.topology:
        raise errors.UserError(
            "--topology is missing: what to compile for, as in --topology=v5e:4x4"
        )
    if flags.smallest and (flags.search or flags.hlo):
        raise errors.UserError("--smallest goes with neither --search nor --hlo")
    # Nothing runs on a device here: an accelerator stays free for whoever uses it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jft.plan import report

    model, architecture = _architecture(config, origins, arguments)
    result, extra = _result(flags, config, architecture)
    found = (
        {"model_path": model}
        | report.describe(result, price=flags.price, tokens=flags.tokens)
        | extra
    )
    if flags.hlo:
        _write(flags.hlo, result.train.program.text)
    parsing.show(found, report.render(found), flags.json)
    return 0


def _parser() -> parsing.Parser:
    parser = parsing.Parser("plan", HELP)
    add = parser.add_argument
    add(
        "--config", metavar="FILE[:ARG]", help="a file with get_config(arg), and --config.key=value"
    )
    add("--topology", help="chip:shape, as v5e:4x4, v5p:2x2x4, h100:8; 2*v5e:4x4 for two slices")
    add("--search", action="store_true", help="try remat policies, micro-batches and meshes")
    add("--limit", type=_positive, help="how many programs --search compiles; 12")
    add(
        "--smallest",
        action="store_true",
        help="the smallest topology of a chip (--topology=v5e) that fits",
    )
    add("--price", type=_amount, help="dollars for a chip and hour")
    add(
        "--tokens",
        type=_amount,
        help="of the run, for its cost; without it steps x rows x length, or a million",
    )
    add("--hlo", metavar="FILE", help="write the optimised training program as text")
    add(
        "--model",
        help="count this: a preset, a config.json, a folder, a .gguf file, an embedded model or a Hub name",
    )
    add("--revision", help="of a Hub name: branch, tag or commit")
    add("--rank", type=int, default=16, help="of the adapter that is counted; 16")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        found = float(text.replace("_", ""))
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return found


def _count(flags: Any) -> int:
    if flags.topology:
        raise errors.UserError("--topology needs a configuration: --config=configs/sft.py")
    if not flags.model:
        raise errors.UserError(
            "give --config=FILE and --topology=NAME, or --model=NAME (jft plan --help explains)"
        )
    from jft import plan

    found = plan.plan(flags.model, revision=flags.revision, rank=flags.rank)
    parsing.show(found, plan.render(found), flags.json)
    return 0


def _architecture(
    config: Any, origins: dict[str, str], arguments: Sequence[str]
) -> tuple[str, Any]:
    """The model by name, and its architecture.

    A preset that the configuration's argument names (configs/sft.py:llama3.1-8b) is known here; only another model.path is
    looked up where it points to.
    """
    from jft import plan
    from jft.models import families

    preset = _spec(arguments).partition(":")[2]
    if preset in families.PRESETS and origins["model.path"] != "flag":
        return preset, families.preset(preset)
    return config.model.path, plan.read_config(config.model.path, config.model.revision or None)


def _spec(arguments: Sequence[str]) -> str:
    words = [word for word in arguments if word.split("=")[0] == "--config"]
    name, equals, spec = words[-1].partition("=")
    return spec if equals else arguments[list(arguments).index(name) + 1]


def _say(line: str) -> None:
    print(f"jft: {line}", file=sys.stderr)


def _result(flags: Any, config: Any, architecture: Any) -> tuple[Any, dict[str, Any]]:
    """What to report, and what a search or a refusal adds to it."""
    from jft.plan import advice, compiled, search, topology

    if flags.smallest:
        names = topology.slices_of(flags.topology)
        first = compiled.setting(config, architecture, topology.parse(names[0]))
        result = search.smallest(first, flags.topology, say=_say)
        if result is None:
            raise errors.UserError(
                f"--smallest: no {flags.topology} up to {names[-1]} fits (or divides the model) with remat={config.remat!r}"
            )
        return result, {}
    own = compiled.setting(config, architecture, topology.parse(flags.topology))
    if flags.search:
        tried, result = search.search(own, limit=flags.limit or search.LIMIT, say=_say)
        table = [one.row() for one in tried]
        if result is None:
            raise errors.UserError(
                f"--search: none of {len(tried)} settings fits within {search.SHARE:.0%} of the memory: take more or larger devices"
            )
        return result, {"tried": table}
    result = compiled.compile_setting(own, say=_say)
    if result.fits:
        return result, {}
    found = advice.cheapest(result, say=_say)
    return result, {"cheapest_change": found and found.overrides}


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.UserError(f"--hlo={path}: {error.strerror}") from error
    _say(f"wrote {path}")
