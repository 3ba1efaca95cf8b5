#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One machine with one or more NVIDIA GPUs: one process uses all of them (CUDA_VISIBLE_DEVICES narrows it).
#
#   launch/gpu.sh [--dry-run] jft train --config=configs/sft.py --config.data.train=examples.jsonl
#
# Installs jft with CUDA into .venv where there is none. A run that is killed (out of memory, say) goes on from its last
# checkpoint, RETRIES times (3). Exit codes are those of jft; the same line goes on with a run that was stopped.
set -euo pipefail
usage() { awk 'NR > 2 && !/^#( |$)/ {exit} NR > 2 {sub(/^# ?/, ""); print}' launch/gpu.sh >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
# jax takes 75 % of a GPU's memory by default; what is not taken can't be trained with.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

if [[ "${1:-}" == --dry-run ]]; then
  shift
  printf '%q ' env "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" "$@"
  echo
  exit 0
fi
[[ $# -gt 0 ]] || usage
nvidia-smi --list-gpus >&2 || { echo "launch: nvidia-smi finds no GPU here" >&2; exit 2; }
if ! command -v jft >/dev/null; then
  python3 -m venv .venv
  .venv/bin/pip install -q -e '.[train,cuda]'
fi

for ((attempt = 0; ; attempt++)); do
  code=0
  "$@" || code=$?
  # 130, 143: stopped by a person. Others below 128, but for 75: done, or what another attempt would meet again.
  if [[ $code -eq 130 || $code -eq 143 || ($code -lt 128 && $code -ne 75) || $attempt -ge ${RETRIES:-3} ]]; then
    exit "$code"
  fi
  echo "launch: ended with $code; going on" >&2
done
