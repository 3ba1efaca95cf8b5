# SPDX-License-Identifier: Apache-2.0
"""Runs meshes_on_eight_devices.py."""

import pathlib
from collections.abc import Callable


def test_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("meshes_on_eight_devices.py"))
