# SPDX-License-Identifier: Apache-2.0
"""`jft verify`."""

from jft.verbs import parsing

HELP = """\
Checks a run: reads its checkpoints and results back against their digests, and goes on from a checkpoint for a few steps,
once straight and once with a stop and a start in between: both must be equal, bit for bit. The run's folder is only read,
also while it trains.

examples:
  jft verify runs/mine
  jft verify --json runs/mine
"""


def run(arguments: list[str]) -> int:
    parser = parsing.Parser("verify", HELP)
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--steps", type=int, default=2, help="before the stop and after it; default 2"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    from jft import verify

    found = verify.verify(flags.run, flags.steps)
    parsing.show(verify.described(found), verify.render(found), flags.json)
    return int(any(one.fault for one in found))
