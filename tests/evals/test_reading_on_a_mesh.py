# SPDX-License-Identifier: Apache-2.0
"""Runs reading_on_eight_devices.py."""

import pathlib
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_eight_devices(eight_devices: Callable[..., None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("reading_on_eight_devices.py"))
