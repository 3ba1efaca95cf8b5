# SPDX-License-Identifier: Apache-2.0
"""Models from one form to another: `export_model`, `import_model`, `merge`, the verbs `export`, `import` and `merge`.

All three load a base on the host in the numbers it is stored in, perhaps fold an adapter into it, and write a Hugging
Face folder or a .gguf file. Each returns what `--json` prints; `render` is the same for a person.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import jft
from jft import errors, lora, runs, sources, tree
from jft.data import encoding, load
from jft.lora import peft
from jft.models import architecture, export, families, names, packed_folder, quantizing, shards

FORMATS = ("hf", "gguf")
_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
MIN_COSINE = 0.9


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to and how, as the flags say.

    Attributes:
      out: a folder, or a .gguf file.
      format: "hf" or "gguf"; "" = gguf where `out` ends in .gguf.
      dtype: of the numbers written; "" = as they are stored. q8_0 is for gguf alone.
      max_shard_size: of a folder's files, in bytes.
      quantize: writes a quantised base instead, which is loaded without the original; a folder.
      force: write over what is there, and take a base that has changed since training.
    """

    out: pathlib.Path
    format: str = ""
    dtype: str = ""
    max_shard_size: int = export.MAX_SHARD_SIZE
    force: bool = False
    quantize: quantizing.Settings = quantizing.DENSE

    @property
    def gguf(self) -> bool:
        return (self.format or ("gguf" if self.out.suffix == ".gguf" else "hf")) == "gguf"

    @property
    def float_dtype(self) -> str | None:
        """What parameters are loaded in."""
        return None if self.dtype in ("", "q8_0") else self.dtype

    def check(self, *used: pathlib.Path) -> None:
        """Raises UserError for a target that can't be, or that is one of the folders `used`: before long work."""
        if self.format not in ("", *FORMATS):
            raise errors.UserError(f"--format={self.format}: one of {', '.join(FORMATS)}")
        known = list(_KINDS) if self.gguf else list(_KINDS)[:-1]
        if self.dtype and self.dtype not in known:
            kind = "a .gguf file" if self.gguf else "a folder"
            raise errors.UserError(f"--dtype={self.dtype}: {kind} has one of {', '.join(known)}")
        self.quantize.check()
        if self.quantize and self.gguf:
            raise errors.UserError(
                f"--out={self.out}: --quantize writes a folder; a .gguf of 8-bit blocks is --dtype=q8_0"
            )
        for place in used:
            if place.exists() and self.out.exists() and self.out.samefile(place):
                raise errors.UserError(f"--out={self.out}: is what is read; name another place")
        if not self.gguf and not self.force and export.kind(self.out) == "full":
            raise errors.UserError(f"--out={self.out}: is a run's result; name another folder")
        if not self.gguf:
            export.check_target(self.out, force=self.force)
        elif self.out.is_dir():
            raise errors.UserError(f"--out={self.out}: is a folder; a .gguf is a file")
        elif self.out.exists() and not self.force:
            raise errors.UserError(f"--out={self.out}: is there already; --force replaces it")


def export_model(target: Target, model: str, revision: str | None = None) -> dict[str, Any]:
    """Writes a model in another form."""
    target.check(pathlib.Path(model))
    base = sources.base(
        model, revision=revision, dtype=target.float_dtype, quantize=target.quantize
    )
    return _write(target, base, {})


def import_model(target: Target, model: str, revision: str | None = None) -> dict[str, Any]:
    """Brings a model into a folder of ours."""
    if target.gguf:
        raise errors.UserError(
            f"--out={target.out}: import writes a folder; `jft export` writes .gguf"
        )
    return export_model(target, model, revision)


def export_run(
    target: Target, run: str, which: str = "best", *, min_cosine: float = MIN_COSINE
) -> dict[str, Any]:
    """Writes the result of a run: its adapter merged into its base, or the weights that were trained whole."""
    if which not in ("best", "last"):
        raise errors.UserError(f"--adapter={which}: best or last; `jft merge` takes a folder")
    folder = sources.result_folder(run, which)
    sidecar = runs.read_sidecar(folder)
    if sidecar.kind == "lora":
        return merge(target, folder, min_cosine=min_cosine)
    target.check(folder)
    base = sources.base(str(folder), dtype=target.float_dtype)
    return _write(target, base, {"system": sidecar.system} if sidecar.system else {})


def merge(
    target: Target,
    adapter: str | pathlib.Path,
    model: str = "",
    revision: str | None = None,
    *,
    min_cosine: float = MIN_COSINE,
) -> dict[str, Any]:
    """Folds an adapter into its base for good, and writes the sum.

    Args:
      target: see there.
      adapter: a PEFT folder, a run's best/ or last/, or the run's folder.
      model: the base; "" = the one that the adapter names.
      revision: of the base.
      min_cosine: see `lora.merge`.

    Raises:
      UserError: the adapter does not fit the base, or too little of it would survive rounding.
    """
    found = sources.adapter(adapter)
    name = model or found.base
    if found.sidecar and name == found.base:
        name, own = sources.original(name, found.revision)
        found = dataclasses.replace(found, base=name, revision=own)
    if not name:
        raise errors.UserError(
            f"{found.folder}: does not say which base it belongs to; give --model"
        )
    target.check(found.folder, pathlib.Path(name))
    try:
        revision = found.revision_of(name, revision)
        base = sources.base(name, revision=revision, dtype=target.float_dtype)
    except errors.UserError as error:
        hint = "" if model else f" (the base that {found.folder} names; --model names another)"
        raise errors.UserError(f"{error}{hint}") from error
    found.check_base(name, base.fingerprint, target.force)
    survival = _merge_into(base, found, min_cosine)
    record: dict[str, Any] = {"adapter": str(found.folder)}
    if found.sidecar:
        load.use_template(base.tokenizer, found.sidecar.chat_template)
        record |= {"system": found.sidecar.system} if found.sidecar.system else {}
    if target.dtype == "q8_0":
        _note("what survives is measured before the rounding to q8_0")
    return _write(target, base, record) | {"survival": survival}


def _merge_into(base: sources.Base, adapter: sources.Adapter, min_cosine: float) -> dict[str, Any]:
    """Adds an adapter to the base's parameters, one at a time on the device; tells what survived of each update.

    Each sum takes the place of its base's array: beside the whole base they would take its memory twice.
    """
    modules = families.modules(base.config)
    adapters = peft.load(adapter.folder, modules, base.params, architecture.LAYOUTS)
    survival: dict[str, Any] = {}
    for path, factors in adapters.items():
        *parents, last = path.split("/")
        node = functools.reduce(lambda node, key: node[key], parents, base.params)
        leaf = node[last]
        if leaf.dtype == np.float64:
            raise errors.UserError(f"{path}: is float64; merge with --dtype=float32")
        done = lora.merge({path: jnp.asarray(leaf)}, {path: factors}, min_cosine=min_cosine)
        node[last] = np.asarray(done.params[path])
        survival[path] = dataclasses.asdict(done.report[path])
    return survival


def _write(target: Target, base: sources.Base, record: Mapping[str, Any]) -> dict[str, Any]:
    source = {
        "source": base.name,
        "revision": base.revision,
        "source_fingerprint": base.fingerprint,
    }
    described = {
        "out": str(target.out),
        "format": "gguf" if target.gguf else "hf",
        "family": base.config.family,
        "parameters": names.parameter_count(base.config),
        "config": architecture.describe(base.config),
    }
    put = _write_gguf if target.gguf else _write_folder
    return described | source | dict(record) | put(target, base, source | dict(record))


def _write_folder(target: Target, base: sources.Base, record: Mapping[str, Any]) -> dict[str, Any]:
    written = export.save(
        target.out,
        base.config,
        base.params,
        base.tokenizer,
        stop=_stop(base),
        max_shard_size=target.max_shard_size,
        record={"jft": jft.__version__, **record},
        origin=_origin(base, target.quantize) if target.quantize else None,
        force=target.force,
    )
    quantized = {"quantize": dataclasses.asdict(target.quantize)} if target.quantize else {}
    return quantized | {
        "dtype": written.dtype,
        "bytes": written.weight_bytes,
        "files": list(written.files),
        "fingerprint": written.fingerprint,
    }


def _origin(base: sources.Base, settings: quantizing.Settings) -> packed_folder.Origin:
    here = pathlib.Path(base.name).expanduser().exists()
    name = str(base.place.resolve()) if here else base.name
    return packed_folder.Origin(name, base.revision, base.fingerprint, settings)


def _stop(base: sources.Base) -> set[int]:
    """The ids that end an answer; of a template that can't be used in training, only the tokenizer's own."""
    try:
        return encoding.stop_tokens(base.tokenizer)
    except errors.UserError as error:
        _note(f"{base.name}: generation_config.json has the tokenizer's end token alone: {error}")
        return set()


def _write_gguf(target: Target, base: sources.Base, record: Mapping[str, Any]) -> dict[str, Any]:
    from jft.models import gguf_export

    dtype = target.dtype or shards.widest(x.dtype for x in tree.flatten(base.params).values())
    if dtype not in _KINDS:
        raise errors.UserError(f"{base.name}: is {dtype}; a .gguf needs --dtype={'|'.join(_KINDS)}")
    report = gguf_export.save(target.out, base.config, base.params, base.tokenizer, _KINDS[dtype])
    for note in report.notes:
        _note(note)
    size = target.out.stat().st_size
    return {"dtype": dtype, "bytes": size, "files": [target.out.name], "kinds": dict(report.kinds)}


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def render(found: Mapping[str, Any], *, config: bool = False) -> str:
    """What was done, for a person; with the configuration where it is new to them."""
    revision = f" at {found['revision']}" if found["revision"] else ""
    lines = [
        f"source       {found['source']}{revision}, fingerprint {found['source_fingerprint']}",
        f"model        {found['family']}, {found['parameters']:,} parameters",
    ]
    if config:
        lines += [f"  {key:<20} {value}" for key, value in found["config"].items()]
    if "survival" in found:
        lines += [f"adapter      {found['adapter']}", *_survival(found["survival"])]
    if "system" in found:
        lines.append(f"trained with the system message {found['system']!r}: send it along")
    own = found.get("quantize")
    kinds = f"{own['kind']} (embeddings: {own['embeddings']}), rest" if own else ""
    size = f"{found['bytes'] / 1e6:,.1f} MB of {kinds} {found['dtype']}".replace("  ", " ")
    files = "" if found["format"] == "gguf" else f" in {len(found['files'])} files"
    lines.append(f"wrote        {found['out']}: {size}{files}")
    if "fingerprint" in found:
        lines.append(f"fingerprint  {found['fingerprint']}")
    return "\n".join(lines)


def _survival(survival: Mapping[str, Mapping[str, float]]) -> list[str]:
    width = max(map(len, survival))
    lines = [f"  {'':<{width}}  update/weights  kept  cosine"]
    for path, s in survival.items():
        numbers = f"{100 * s['relative']:12.3f} % {100 * s['gain']:5.1f} % {s['cosine']:7.4f}"
        lines.append(f"  {path:<{width}} {numbers}")
    return lines
