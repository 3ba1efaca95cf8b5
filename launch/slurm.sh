#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A Slurm cluster: one process on each node, with all of the node's GPUs.
#
#   launch/slurm.sh [--dry-run] --nodes=2 --gpus-per-node=8 --time=8:00:00 jft train --config=configs/sft.py ...
#
# What stands before the command goes to sbatch (written --name=value). run_dir must be on a file system that all nodes
# share, and jft on the PATH of the nodes. Two minutes before the time limit jft gets SIGTERM, saves and ends; the job is
# then put back into the queue and goes on, as after a preemption, MAX_RESTARTS times (100). Bad input ends it.
#SBATCH --job-name=jft
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

usage() { awk 'NR > 2 && !/^#( |$)/ {exit} NR > 2 {sub(/^# ?/, ""); print}' "${BASH_SOURCE[0]}" >&2; exit 2; }

dry='' options=()
while [[ "${1:-}" == -* ]]; do
  if [[ "$1" == --dry-run ]]; then dry=1; else options+=("$1"); fi
  shift
done
[[ $# -gt 0 ]] || usage

if [[ -z "${SLURM_JOB_ID:-}" || -n "$dry" ]]; then
  submit=(sbatch ${options[@]+"${options[@]}"} "${BASH_SOURCE[0]}" "$@")
  if [[ -z "$dry" ]]; then exec "${submit[@]}"; fi
  printf '%q ' "${submit[@]}"
  echo
  printf '%q ' srun --kill-on-bad-exit=1 "$@"
  echo
  exit 0
fi

# srun no longer takes this from the job: without it a process may be bound to one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
code=0
srun --kill-on-bad-exit=1 "$@" || code=$?
if [[ $code -eq 0 || $code -eq 2 || ${SLURM_RESTART_COUNT:-0} -ge ${MAX_RESTARTS:-100} ]]; then
  exit "$code"
fi
echo "launch: ended with $code; back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
