# SPDX-License-Identifier: Apache-2.0
"""The `jft` command: `jft VERB --flag=value ...`. Each verb is a small file's worth of flags over the library."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jft import errors

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended

TRAIN_HELP = """\
Fine-tunes a model as a configuration file says; goes on where the run's folder left off.

example:
  jft train --config=configs/sft.py:smollm2-135m --config.data.train=examples.jsonl --config.run_dir=runs/mine

Every key of the configuration is a flag: --config.optim.learning_rate=1e-4. The keys, with their meaning, are in
jft/config.py; `jft train --config=FILE --dry_run` prints their values.
"""
GENERATE_HELP = """\
Talks to the result of a run: interactively, or once with --prompt.

examples:
  jft generate --run=runs/mine
  jft generate --run=runs/mine --prompt="My kettle leaks. Order 48213. Ana" --adapter=none
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    # transformers would say at every start that there is no PyTorch: there need not be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return _dispatch(arguments)
    except errors.UserError as error:
        if debug:
            raise
        print(f"jft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; closing it again must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jft VERB [flags]\n")
        for name, (help_text, _) in VERBS.items():
            print(f"  {name:<10} {help_text.splitlines()[0]}")
        print("\njft VERB --help explains one; --debug shows the traceback of an error")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1, 0.0)[0]
        raise errors.UserError(f"no verb {verb!r}; did you mean `jft {near}`?")
    return VERBS[verb][1](arguments[1:])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise errors.UserError(f"{message} (jft {self.prog.split()[-1]} --help explains)")


def _parser(verb: str, help_text: str) -> _Parser:
    return _Parser(
        prog=f"jft {verb}",
        description=help_text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def read_config(arguments: Sequence[str]) -> tuple[Any, dict[str, str], list[str]]:
    """The configuration that --config=FILE[:ARG] and --config.key=value say, its origins, and the other arguments."""
    from jft import config

    spec, changes, rest = None, [], []
    words = iter(arguments)
    for word in words:
        name, _, text = word.partition("=")
        if name == "--config" or name.startswith("--config."):
            if "=" not in word:
                text = next(words, None)
                if text is None:
                    raise errors.UserError(f"{name} needs a value: {name}=...")
            if name == "--config":
                spec = text
            else:
                changes.append((name.removeprefix("--config."), text))
        else:
            rest.append(word)
    if spec is None:
        raise errors.UserError("--config=FILE is missing, for instance --config=configs/sft.py")
    loaded = config.load(spec)
    config.check_complete(loaded, spec)
    origins = {
        key: spec if key in config.difference(loaded, config.base()) else "base()"
        for key in config.flatten(loaded)
    }
    for key, text in changes:
        config.override(loaded, key, text)
        origins[key] = "flag"
    return loaded, origins, rest


def _train(arguments: list[str]) -> int:
    parser = _parser("train", TRAIN_HELP)
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a file with get_config(arg)")
    parser.add_argument(
        "--fresh", action="store_true", help="move an existing run aside, start anew"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the configuration and stop")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    config, origins, rest = read_config(arguments)
    flags = parser.parse_args(rest)
    if flags.dry_run:
        from jft import config as configuration

        for key, value in configuration.flatten(config).items():
            print(f"{key:<28} {value!r:<64} {origins[key]}")
        return 0
    from jft import loop, summary

    try:
        result = loop.train(config, fresh=flags.fresh)
    except loop.Interrupted as stop:
        print(f"jft: {stop}", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(result, ensure_ascii=False) if flags.json else summary.render(result))
    return 0


def _generate(arguments: list[str]) -> int:
    parser = _parser("generate", GENERATE_HELP)
    parser.add_argument("--run", required=True, help="a run's folder, or its best/ or last/")
    parser.add_argument(
        "--adapter", default="best", help="best, last, none (the base), or an adapter's folder"
    )
    parser.add_argument("--prompt", help="answer this and exit; - reads standard input")
    parser.add_argument("--system", help="system message; default: the one of training")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top_k", type=int, default=0, help="0 = all")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--force", action="store_true", help="use a base that has changed since")
    flags = parser.parse_args(arguments)
    from jft import talk

    talk.run(flags)
    return 0


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": (TRAIN_HELP, _train),
    "generate": (GENERATE_HELP, _generate),
}


if __name__ == "__main__":
    sys.exit(main())
