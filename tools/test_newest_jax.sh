#!/usr/bin/env bash
# The transform's tests on the newest jax, in an environment of their own with nothing but jax, safetensors, pytest and pytest-xdist:
#
#     tools/test_newest_jax.sh [PYTHON]      # python3.12 by default: newer jax releases need it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${1:-python3.12}"
if [[ ! -x .newest-venv/bin/python ]]; then
  "$python" -m venv .newest-venv
fi
.newest-venv/bin/python -m pip install -q --disable-pip-version-check --upgrade jax safetensors pytest pytest-xdist
.newest-venv/bin/python -c 'import jax; print("jax", jax.__version__)'
PYTHONPATH=. .newest-venv/bin/python -m pytest tests/quant \
  tests/lora/test_{transform,variants,programs,quantized,merge_and_files,refusals,sharding}.py
