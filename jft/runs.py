# SPDX-License-Identifier: Apache-2.0
"""A run's folder: what is written there, and how its result is opened again.

    config.json  environment.json  data_report.json  metrics.jsonl  samples.jsonl  summary.json
    checkpoints/  best/  last/

`best/` and `last/` hold an adapter in PEFT's format (or, after full fine-tuning, a model folder) and `jft.json`,
which says what it belongs to: base model, fingerprint, template. One of them alone is enough to generate.

Of several processes the first writes all of this but the checkpoints, and all see it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
from ml_collections import config_dict

from jft import config as configuration
from jft import errors, hosts, lora, models, secrets, sharding, sidecars, transfer
from jft.data import encoding, load, tokenised
from jft.lora import peft
from jft.models import export, quantizing

SIDECAR = "jft.json"
PACKAGES = (
    "jft jax jaxlib flax optax orbax-checkpoint transformers tokenizers numpy safetensors".split()
)


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """`jft.json`: what a result belongs to."""

    kind: str  # "lora" or "full"
    base: str
    revision: str
    dtype: str
    fingerprint: str
    system: str
    chat_template: str  # set in place of the tokenizer's; "" = the tokenizer's own
    template_sha256: str
    tokenizer_sha256: str
    step: int
    scores: dict[str, float]
    training: dict[str, Any]

    @property
    def quantize(self) -> quantizing.Settings:
        """How the base was quantised that an adapter was trained on."""
        model = self.training.get("model", {}) if self.kind == "lora" else {}
        kind, embeddings = (model.get(k, quantizing.NONE) for k in quantizing.KEYS)
        return quantizing.Settings(kind, embeddings)

    def other_base(self, used: quantizing.Settings) -> str:
        """What is to be said of an adapter on a base that is quantised otherwise than in training; "" of any other."""
        if self.kind != "lora" or self.quantize == used:
            return ""
        return (
            f"the adapter was trained on {self.base} with {self.quantize}, and is used with {used}"
        )


def claim(folder: pathlib.Path, config: config_dict.ConfigDict, fresh: bool) -> None:
    """Makes the run's folder; an existing one must hold the same run, or moves aside.

    Raises:
      UserError: it holds another run, can't be made, or is not one folder for all processes.
    """
    if hosts.lead():
        _claim(folder, config, fresh)
    _check_seen_by_all(folder)


def _claim(folder: pathlib.Path, config: config_dict.ConfigDict, fresh: bool) -> None:
    if fresh and folder.exists():
        aside = next(
            p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists()
        )
        folder.rename(aside)
        print(f"the run that was in {folder} is now in {aside}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"run_dir={folder}: {error.strerror}") from error
    described = folder / "config.json"
    if not described.exists():
        return
    before = read_json(described)["resolved"]
    changed = {
        key: values
        for key, values in configuration.difference(
            secrets.redacted(config.to_dict()), before
        ).items()
        if not key.startswith(configuration.NOT_MATHEMATICS)
    }
    if changed:
        told = "; ".join(f"{key} is {new!r}, was {old!r}" for key, (new, old) in changed.items())
        raise errors.UserError(
            f"{folder} holds a run with other settings ({told}): give --config.run_dir=NEW, or --fresh"
            " to start again there"
        )


def _check_seen_by_all(folder: pathlib.Path) -> None:
    """Raises UserError where the lead's folder is not there for the others: each would find only its own files."""
    if not hosts.several():
        return
    mark = folder / ".claimed"
    if hosts.lead():
        mark.write_text(str(time.time_ns()))
    hosts.barrier("run_dir is claimed")
    seen = mark.read_text() if mark.exists() else "no such folder"
    hosts.agree(f"run_dir={folder} (a mounted bucket or a shared file system is needed)", seen)
    if hosts.lead():
        mark.unlink()


def describe(
    folder: pathlib.Path,
    config: config_dict.ConfigDict,
    report: dict[str, Any],
    layout: sharding.Layout | None,
) -> None:
    """Writes what a run is before its first step."""
    changes = configuration.difference(config, configuration.base())
    resolved = {
        "resolved": config.to_dict(),
        "difference": {key: {"here": a, "base": b} for key, (a, b) in changes.items()},
    }
    write_json(folder / "config.json", secrets.redacted(resolved))
    write_json(folder / "environment.json", environment(layout))
    write_json(folder / "data_report.json", secrets.redacted(report))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path}: cannot be read: {error}") from error


def environment(layout: sharding.Layout | None) -> dict[str, Any]:
    """Versions, devices and the commit: what a number in this run's folder was computed with."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": secrets.command(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": {} if layout is None else dict(layout.mesh.shape),
        "packages": versions,
        "git": _commit(),
    }


def _commit() -> str | None:
    """The commit of the current folder, where it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def save_result(
    folder: pathlib.Path, model: models.Model, trainable: Any, sidecar: Sidecar
) -> None:
    """Writes `best/` or `last/`: the weights first, then jft.json. Every process calls it."""
    trainable = transfer.to_lead(trainable)
    if not hosts.lead():
        return
    if sidecar.kind == "lora":
        peft.save(
            folder,
            trainable,
            model.module_names,
            base_name=sidecar.base,
            revision=sidecar.revision or None,
        )
    else:
        stop = encoding.stop_tokens(model.tokenizer)
        record = _written(sidecar)
        export.save(
            folder, model.config, trainable, model.tokenizer, stop=stop, record=record, force=True
        )
    write_json(folder / SIDECAR, _written(sidecar))


def _written(sidecar: Sidecar) -> dict[str, Any]:
    """As it is written. The system's message and the template are the model's, and stay as they are."""
    return dataclasses.asdict(sidecar) | {"training": secrets.redacted(sidecar.training)}


def tokenizer_hashes(tokenizer: Any) -> tuple[str, str]:
    """sha256 of the chat template and of the tokenizer itself."""
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:32]
    return template, tokenised.tokenizer_hash(tokenizer)


def open_result(
    folder: str | pathlib.Path,
    *,
    adapter: bool = True,
    force: bool = False,
    shardings: Any = None,
    quantize: quantizing.Settings | None = None,
) -> tuple[models.Model, lora.Adapters, Sidecar]:
    """The model and adapter of a `best/` or `last/` folder.

    Args:
      folder: holds jft.json.
      adapter: False gives the base alone.
      force: accept a base whose fingerprint differs.
      shardings: of the model's parameters, see `models.load`.
      quantize: of the base; None: as in training.

    Raises:
      UserError: it is no such folder, or the base is not the one that it was trained on.
    """
    folder = pathlib.Path(folder)
    sidecar = read_sidecar(folder)
    own_weights = sidecar.kind == "full" and adapter
    model = models.load(
        str(folder) if own_weights else sidecar.base,
        dtype=sidecar.dtype,
        revision=None if own_weights else sidecar.revision or None,
        shardings=shardings,
        quantize=sidecar.quantize if quantize is None else quantize,
    )
    if not own_weights and model.fingerprint != sidecar.fingerprint and not force:
        raise errors.UserError(
            f"{folder}: trained on {sidecar.base} with fingerprint {sidecar.fingerprint}, but that"
            f" name now gives {model.fingerprint}; --force uses it all the same"
        )
    load.use_template(model.tokenizer, sidecar.chat_template)
    adapters = model.load_adapter(folder) if adapter and sidecar.kind == "lora" else {}
    return model, adapters, sidecar


def read_sidecar(folder: pathlib.Path) -> Sidecar:
    if not (folder / SIDECAR).is_file():
        raise errors.UserError(f"{folder}: no {SIDECAR} there; is it a run's best/ or last/?")
    return Sidecar(**sidecars.read(folder / SIDECAR))


class Metrics:
    """metrics.jsonl: one object per line, appended; a resumed run drops what lies behind its checkpoint."""

    def __init__(self, path: pathlib.Path, step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                record = _parsed(line)
                if record is not None and record["step"] <= step:
                    kept.append(record)
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parsed(line: str) -> dict[str, Any] | None:
    """A line's object; None for an empty line or one that was cut off by a crash."""
    try:
        return json.loads(line)
    except ValueError:
        return None
