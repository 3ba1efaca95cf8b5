# SPDX-License-Identifier: Apache-2.0
"""A run's folder: what is written there, and how its result is opened again.

    config.json  environment.json  data_report.json  metrics.jsonl  timing.jsonl  samples.jsonl  summary.json
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
from typing import Any

import jax
from ml_collections import config_dict

from jft import config as configuration
from jft import errors, hosts, lora, models, secrets, sharding, sidecars, swap, transfer
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
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 of those beside it

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
    """Writes `best/` or `last/`, in the place of the one before in one instant. Every process calls it.

    Raises:
      OSError: it can't be written.
    """
    trainable = transfer.to_lead(trainable)
    if not hosts.lead():
        return
    import safetensors

    part = swap.beside(folder)
    try:
        _write_result(part, model, trainable, sidecar)
        swap.replace(folder, part)
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder}: can't be written: {error}") from error


def _write_result(
    part: pathlib.Path, model: models.Model, trainable: Any, sidecar: Sidecar
) -> None:
    if sidecar.kind == "lora":
        peft.save(
            part,
            trainable,
            model.module_names,
            base_name=sidecar.base,
            revision=sidecar.revision or None,
        )
    else:
        stop = encoding.stop_tokens(model.tokenizer)
        record = _written(sidecar)
        export.save(
            part, model.config, trainable, model.tokenizer, stop=stop, record=record, force=True
        )
    sidecar = dataclasses.replace(sidecar, files=file_digests(part))
    write_json(part / SIDECAR, _written(sidecar))


def file_digests(folder: pathlib.Path) -> dict[str, str]:
    """{name: sha256} of a result's files, but for jft.json, which holds them."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != SIDECAR:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


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
    while True:
        sidecar = read_sidecar(folder)
        found = _open(folder, sidecar, adapter, force, shardings, quantize)
        # A run that is training may have replaced the folder meanwhile: what was read is then of two.
        if read_sidecar(folder) == sidecar:
            return *found, sidecar


def _open(
    folder: pathlib.Path,
    sidecar: Sidecar,
    adapter: bool,
    force: bool,
    shardings: Any,
    quantize: quantizing.Settings | None,
) -> tuple[models.Model, lora.Adapters]:
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
    return model, adapters


def read_sidecar(folder: pathlib.Path) -> Sidecar:
    if not (folder / SIDECAR).is_file():
        raise errors.UserError(f"{folder}: no {SIDECAR} there; is it a run's best/ or last/?")
    return Sidecar(**sidecars.read(folder / SIDECAR))
