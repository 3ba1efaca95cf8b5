# SPDX-License-Identifier: Apache-2.0
"""`jft generate`: one answer or a conversation, with tokens shown as they come, or answers to a file of prompts."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jft import answers, errors, generate, lora, models, runs, sources
from jft.data import encoding, load
from jft.models import quantizing


def run(flags: argparse.Namespace) -> None:
    """Answers --prompt or --prompts, or converses until end of input; the flags are those of `jft generate`."""
    sampling = generate.Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
        max_new_tokens=flags.max_new_tokens,
    )
    _check(flags)
    rows = [] if flags.prompts is None else answers.read(flags.prompts, flags.out, raw=flags.raw)
    generator, system = _open(flags)
    if flags.prompts is not None:
        _answer_file(flags, generator, rows, system, sampling)
    elif flags.prompt is not None:
        prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
        asked = _asked(generator, prompt, system, flags.raw)
        text = "".join(_pieces(generator, asked, sampling, shown=not flags.json, raw=flags.raw))
        if flags.json:
            print(json.dumps({"prompt": prompt, "response": text}, ensure_ascii=False))
    else:
        _converse(generator, system, sampling, raw=flags.raw)


def _check(flags: argparse.Namespace) -> None:
    """Raises UserError for flags that have no meaning together."""
    many, one = flags.prompts is not None, flags.prompt is not None
    for wrong, why in (
        (many and one, "--prompt and --prompts: give one of them"),
        (flags.out and not many, "--out is of --prompts=FILE"),
        (flags.batch_size is not None and not many, "--batch_size is of --prompts=FILE"),
        (flags.json and not (many or one), "--json needs --prompt or --prompts"),
        (many and flags.json and not flags.out, "--json with --prompts needs --out"),
        (flags.raw and flags.system is not None, "--system has no place in --raw text"),
        (flags.run and (flags.revision or flags.dtype), "--revision and --dtype are of --model"),
    ):
        if wrong:
            raise errors.UserError(why)
    if flags.batch_size is not None and flags.batch_size < 1:
        raise errors.UserError(f"--batch_size={flags.batch_size}: it must be 1 or more")


def _open(flags: argparse.Namespace) -> tuple[generate.Generator, str | None]:
    if flags.run:
        model, adapters, system, used = _open_run(flags)
    else:
        model, adapters, system, used = _open_model(flags)
    if flags.raw:
        system = None
    elif not model.tokenizer.chat_template:
        raise errors.UserError(
            f"{model.name}: has no chat template, as base models have none: --raw continues the prompt as plain text"
        )
    elif flags.system is not None:
        system = flags.system
    plain = "plain text" if flags.raw else f"system message: {system or 'none of ours'}"
    _note(f"{model.name}, {used}; {plain}")
    return generate.Generator(model, adapters), system or None


def _open_run(flags: argparse.Namespace) -> tuple[models.Model, lora.Adapters, str, Any]:
    asked = flags.adapter or "best"
    folder = sources.result_folder(flags.run, asked)
    own = asked in ("best", "last")
    sidecar = runs.read_sidecar(folder)
    used = sidecar.quantize.replaced(flags.quantize, flags.quantize_embeddings)
    model, adapters, sidecar = runs.open_result(
        folder, adapter=own, force=flags.force, quantize=used
    )
    _say(*model.notes, sidecar.other_base(used) if own else "")
    if own or asked == "none":
        return model, adapters, sidecar.system, folder if own else "no adapter"
    return model, model.load_adapter(asked), sidecar.system, asked


def _open_model(flags: argparse.Namespace) -> tuple[models.Model, lora.Adapters, str, Any]:
    """The model with its own template, or with those of training where the adapter knows them."""
    asked = None if flags.adapter in (None, "none") else sources.adapter(flags.adapter)
    revision = asked.revision_of(flags.model, flags.revision) if asked else flags.revision
    used = quantizing.DENSE.replaced(flags.quantize, flags.quantize_embeddings)
    model = models.load(
        flags.model, dtype=flags.dtype or "float32", revision=revision, quantize=used
    )
    _say(*model.notes, asked.sidecar.other_base(used) if asked and asked.sidecar else "")
    if asked is None:
        record = sources.model_record(pathlib.Path(flags.model))
        return model, {}, record.get("system", ""), "no adapter"
    asked.check_base(flags.model, model.fingerprint, flags.force)
    if asked.sidecar:
        load.use_template(model.tokenizer, asked.sidecar.chat_template)
    system = asked.sidecar.system if asked.sidecar else ""
    return model, model.load_adapter(asked.folder), system, asked.folder


def _answer_file(
    flags: argparse.Namespace,
    generator: generate.Generator,
    rows: Sequence[answers.Row],
    system: str | None,
    sampling: generate.Sampling,
) -> None:
    found = answers.answer(
        generator, rows, sampling, system=system, batch_size=flags.batch_size or 8, raw=flags.raw
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows]
    if not flags.out:
        print("".join(lines), end="")
    else:
        answers.write(flags.out, lines)
    report = {"out": flags.out, "rows": len(lines), "cut": found.cut}
    if flags.json:
        print(json.dumps(report))
    where = f"wrote {flags.out}: " if flags.out else ""
    _note(
        f"{where}{len(lines)} answers, {found.cut} cut at --max_new_tokens={flags.max_new_tokens}"
    )


def _say(*notes: str) -> None:
    for note in notes:
        if note:
            _note(note)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _asked(generator: generate.Generator, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The ids of one prompt."""
    if raw:
        return answers.plain_tokens(generator.model.tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    return encoding.prompt_tokens(generator.model.tokenizer, messages, system=system)


def _pieces(
    generator: generate.Generator,
    prompt: Sequence[int],
    sampling: generate.Sampling,
    *,
    shown: bool = True,
    raw: bool = False,
) -> Iterator[str]:
    """The answer as it comes, printed on the way."""
    stream = answers.continued if raw else generate.Generator.stream_text
    for piece in stream(generator, prompt, sampling):
        if shown:
            print(piece, end="", flush=True)
        yield piece
    if shown:
        print()


def _converse(
    generator: generate.Generator, system: str | None, sampling: generate.Sampling, *, raw: bool
) -> None:
    if raw:
        _note("type the beginning of a text; Ctrl-D ends")
    else:
        _note("type a message; an empty line begins a new conversation, Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if raw:
            asked = answers.plain_tokens(generator.model.tokenizer, said) if said else []
            if asked:
                "".join(_pieces(generator, asked, sampling, raw=True))
            continue
        if not said.strip():
            messages = []
            _note("new conversation")
            continue
        messages.append({"role": "user", "content": said})
        asked = encoding.prompt_tokens(generator.model.tokenizer, messages, system=system)
        answer = "".join(_pieces(generator, asked, sampling))
        messages.append({"role": "assistant", "content": answer})
