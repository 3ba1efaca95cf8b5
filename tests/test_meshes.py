# SPDX-License-Identifier: Apache-2.0
"""Runs meshes_on_eight_devices.py."""

import pathlib
from collections.abc import Callable

import pytest

CASES = pathlib.Path(__file__).with_name("meshes_on_eight_devices.py")


def test_eight_devices(eight_devices: Callable[..., None]) -> None:
    eight_devices(CASES)


@pytest.mark.slow
def test_eight_devices_and_every_mesh(eight_devices: Callable[..., None]) -> None:
    eight_devices(CASES, "-m", "slow")
