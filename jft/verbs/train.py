# SPDX-License-Identifier: Apache-2.0
"""`jft train`."""

import argparse
import sys
from typing import Any

from jft.verbs import parsing

HELP = """\
Fine-tunes a model as a configuration file says; goes on where the run's folder left off.

example:
  jft train --config=configs/sft.py:smollm2-135m --config.data.train=examples.jsonl --config.run_dir=runs/mine

Every key of the configuration is a flag: --config.optim.learning_rate=1e-4. The keys, with their meaning, are in
jft/config.py; `jft train --config=FILE --dry_run` prints their values.
"""


def run(arguments: list[str]) -> int:
    parser = parsing.Parser("train", HELP)
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a file with get_config(arg)")
    parser.add_argument(
        "--fresh", action="store_true", help="move an existing run aside, start anew"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on although settings, data or base are others than the run's",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the configuration and stop")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument(
        "--profile", metavar="START:STOP", default="", help="trace these steps into RUN_DIR/profile"
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="stop at the first loss or gradient that is not finite, and find its operation",
    )
    several = parser.add_argument_group(
        "several processes", "on clusters that are not recognised; the same in all but --process"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", default="", help="of process 0")
    several.add_argument("--processes", metavar="N", default="", help="how many there are")
    several.add_argument("--process", metavar="I", default="", help="which this one is, from 0")
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    config, origins, rest = parsing.read_config(arguments)
    flags = parser.parse_args(rest)
    if flags.dry_run:
        from jft import config as configuration

        for key, value in configuration.flatten(config).items():
            print(f"{key:<28} {value!r:<64} {origins[key]}")
        return 0
    from jft import hosts

    with hosts.joined(flags.coordinator, flags.processes, flags.process):
        return _train(config, flags)


def _train(config: Any, flags: argparse.Namespace) -> int:
    from jft import hosts, loop, stopping, summary

    try:
        result = loop.train(
            config,
            fresh=flags.fresh,
            force=flags.force,
            profile=flags.profile,
            debug=flags.debug,
        )
    except loop.Interrupted as stop:
        if hosts.lead():
            print(f"jft: {stop}", file=sys.stderr)
        return stopping.INTERRUPTED
    if hosts.lead():
        parsing.show(result, summary.render(result), flags.json)
    return 0
