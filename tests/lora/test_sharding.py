# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of eight_devices.py on eight simulated devices."""

import pathlib
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_21_on_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("eight_devices.py"))
