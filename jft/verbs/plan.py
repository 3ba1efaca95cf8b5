# SPDX-License-Identifier: Apache-2.0
"""`jft plan`."""

from jft.verbs import parsing

HELP = """\
Counts a model's parameters by kind, its bytes, and what LoRA would train: from its configuration, without loading it.

examples:
  jft plan --model=llama3.1-8b
  jft plan --model=Qwen/Qwen3-30B-A3B --rank=32 --json
  jft plan --model=some/folder/config.json
"""


def run(arguments: list[str]) -> int:
    parser = parsing.Parser("plan", HELP)
    parser.add_argument(
        "--model",
        required=True,
        help="a preset, a config.json, a folder, a .gguf file, an embedded model or a Hub name",
    )
    parser.add_argument("--revision", help="of a Hub name: branch, tag or commit")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter that is counted; 16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    from jft import plan

    found = plan.plan(flags.model, revision=flags.revision, rank=flags.rank)
    parsing.show(found, plan.render(found), flags.json)
    return 0
