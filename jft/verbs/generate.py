# SPDX-License-Identifier: Apache-2.0
"""`jft generate`."""

from jft.verbs import parsing

HELP = """\
Answers with the result of a run, or with any model: in a conversation, once with --prompt, or a whole file.

examples:
  jft generate --run=runs/mine
  jft generate --run=runs/mine --prompt="My kettle leaks. Order 48213. Ana" --adapter=none
  jft generate --model=smollm2-135m-instruct --prompt="Name three colours."
  jft generate --model=gpt2 --raw --prompt="The capital of France is"
  jft generate --run=runs/mine --prompts=questions.jsonl --out=answers.jsonl --batch_size=16

Rows of --prompts have "prompt", or "messages" whose last turn is the user's, and may have "system". They come out in
their order with all their fields and "response".
"""


def run(arguments: list[str]) -> int:
    parser = parsing.Parser("generate", HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run's folder, or its best/ or last/")
    what.add_argument("--model", help="a folder, a .gguf file, an embedded model or a Hub name")
    parser.add_argument("--revision", help="of a Hub name: branch, tag or commit")
    parser.add_argument("--dtype", help="of --model: float32 (default) or bfloat16")
    parsing.add_quantize(parser, "of the base; default: as in training, with --model none")
    parser.add_argument(
        "--adapter",
        help="best (default with --run), last, none (the base), or an adapter's folder",
    )
    parser.add_argument("--prompt", help="answer this and exit; - reads standard input")
    parser.add_argument("--prompts", metavar="FILE", help="answer every row of a file and exit")
    parser.add_argument(
        "--out", metavar="FILE.jsonl", help="of --prompts; default: standard output"
    )
    parser.add_argument("--batch_size", type=int, help="of --prompts: rows at a time; default 8")
    parser.add_argument("--raw", action="store_true", help="continue plain text, without template")
    parser.add_argument("--system", help="system message; default: the one of training")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top_k", type=int, default=0, help="0 = all")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--force", action="store_true", help="use a base that has changed since")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    from jft import talk

    talk.run(flags)
    return 0
