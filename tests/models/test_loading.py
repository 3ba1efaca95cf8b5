# SPDX-License-Identifier: Apache-2.0
"""Loading in processes of their own: onto eight simulated devices, and how much host memory it takes."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_on_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("loading_on_eight_devices.py"))


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_load", ROOT / "tools" / "bench_load.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


@pytest.fixture(scope="module")
def folder(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """0.19 GB in five files, the largest tensor of 34 MB."""
    folder = tmp_path_factory.mktemp("load")
    bench.make(folder, "small")
    return folder


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_the_parameters_and_the_largest_tensor(
    bench: Any, folder: pathlib.Path, devices: int, dtype: str
) -> None:
    found = bench.run(folder, devices, dtype)
    sizes = {"bfloat16": 189e6, "float32": 378e6}
    assert found["kept"] == pytest.approx(sizes[dtype], rel=0.01)
    assert found["kept"] <= found["after"] < found["peak"] <= found["allowed"], found
