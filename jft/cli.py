# SPDX-License-Identifier: Apache-2.0
"""The `jft` command: `jft VERB --flag=value ...`. What a verb takes is in `jft.verbs`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from jft import errors, secrets

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended

# Name: what it does, and the module and function that do it.
VERBS: dict[str, tuple[str, str, str]] = {
    "check": ("tells what is in data before it is trained on", "check", "run"),
    "train": ("fine-tunes a model as a configuration file says", "train", "run"),
    "verify": ("checks a run's checkpoints and results, and that it can go on", "verify", "run"),
    "generate": ("answers with a run's result or with any model", "generate", "run"),
    "export": ("writes a model or a run's result as a folder or a .gguf file", "convert", "export"),
    "import": ("brings a model into a folder of this machine", "convert", "import_"),
    "merge": ("folds an adapter into its base for good", "convert", "merge"),
    "plan": (
        "counts a model, or compiles a run for a topology: does it fit, what does it cost",
        "plan",
        "run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, 1 where a check finds faults, 2 for bad input, 130 when interrupted."""
    # transformers would say at every start that there is no PyTorch: there need not be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if debug and arguments[:1] == ["train"]:  # which does more with it than a traceback
        arguments.append("--debug")
    try:
        return _dispatch(arguments)
    except errors.UserError as error:
        if debug:
            raise
        print(f"jft: {secrets.redacted(str(error))}", file=sys.stderr)
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
        for name, (what, _, _) in VERBS.items():
            print(f"  {name:<10} {what}")
        print("\njft VERB --help explains one; --debug shows the traceback of an error")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1, 0.0)[0]
        raise errors.UserError(f"no verb {verb!r}; did you mean `jft {near}`?")
    _, module, function = VERBS[verb]
    return getattr(importlib.import_module(f"jft.verbs.{module}"), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
