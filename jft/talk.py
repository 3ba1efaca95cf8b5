# SPDX-License-Identifier: Apache-2.0
"""`jft generate`: one answer, or a conversation, with tokens shown as they come."""

import argparse
import pathlib
import sys

from jft import errors, generate, runs
from jft.data import chat


def run(flags: argparse.Namespace) -> None:
    """Answers --prompt, or converses until end of input; the flags are those of `jft generate`."""
    sampling = generate.Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
        max_new_tokens=flags.max_new_tokens,
    )
    generator, system = _open(flags)
    if flags.prompt is not None:
        prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
        _answer(generator, [{"role": "user", "content": prompt}], system, sampling)
    else:
        _converse(generator, system, sampling)


def _open(flags: argparse.Namespace) -> tuple[generate.Generator, str | None]:
    folder = _result_folder(pathlib.Path(flags.run), flags.adapter)
    model, adapters, sidecar = runs.open_result(
        folder, adapter=flags.adapter in ("best", "last"), force=flags.force
    )
    if flags.adapter not in ("best", "last", "none"):
        adapters = model.load_adapter(flags.adapter)
    system = sidecar.system if flags.system is None else flags.system
    used = {"none": "no adapter", "best": folder, "last": folder}.get(flags.adapter, flags.adapter)
    _note(f"{model.name}, {used}; system message: {system or 'none of ours'}")
    return generate.Generator(model, adapters), system or None


def _result_folder(run: pathlib.Path, adapter: str) -> pathlib.Path:
    """best/ or last/ of a run; the folder itself when it is one of those."""
    if not run.is_dir():
        raise errors.UserError(f"--run={run}: no such folder")
    if (run / runs.SIDECAR).exists():
        return run
    wanted = [adapter] if adapter == "last" else ["best", "last"]
    for name in wanted:
        if (run / name / runs.SIDECAR).exists():
            return run / name
    raise errors.UserError(
        f"--run={run}: no {' or '.join(f'{n}/' for n in wanted)} there: has its training got to the first validation?"
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _answer(
    generator: generate.Generator,
    messages: list[dict[str, str]],
    system: str | None,
    sampling: generate.Sampling,
) -> str:
    prompt = chat.prompt_tokens(generator.model.tokenizer, messages, system=system)
    text = ""
    for piece in generator.stream_text(prompt, sampling):
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


def _converse(
    generator: generate.Generator, system: str | None, sampling: generate.Sampling
) -> None:
    _note("type a message; an empty line begins a new conversation, Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if not said.strip():
            messages = []
            _note("new conversation")
            continue
        messages.append({"role": "user", "content": said})
        answer = _answer(generator, messages, system, sampling)
        messages.append({"role": "assistant", "content": answer})
