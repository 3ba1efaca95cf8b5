# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of eight_devices.py in a process of their own, which simulates eight CPU devices."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_21_on_eight_devices() -> None:
    cases = pathlib.Path(__file__).with_name("eight_devices.py")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
