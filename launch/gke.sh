#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# TPU slices on GKE, by a JobSet; made again and gone on with when a pod is lost. (With XPK, which makes clusters too,
# `xpk workload create --command="jft train ..."` takes the place of this script.)
#
#   NAME=mine IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/jft:1 BUCKET=my-bucket \
#   ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 launch/gke.sh [--dry-run] \
#       jft train --config=configs/sft.py:llama3.1-8b --config.run_dir=/mnt/bucket/runs/mine ...
#
# HOSTS: of a slice; CHIPS: of a host. SLICES (1), MAX_RESTARTS (100), SERVICE_ACCOUNT (default), SPOT=1 for spot nodes.
# The image holds jft with its extras train and tpu; the bucket is at /mnt/bucket, where run_dir must lie. Waits for the
# end; when interrupted, the run goes on, and the same line follows it. Exit codes: 0 done, 1 failed.
set -euo pipefail
usage() { awk 'NR > 2 && !/^#( |$)/ {exit} NR > 2 {sub(/^# ?/, ""); print}' "${BASH_SOURCE[0]}" >&2; exit 2; }
here=$(dirname "${BASH_SOURCE[0]}")
dry=''
if [[ "${1:-}" == --dry-run ]]; then dry=1; shift; fi
for needed in NAME IMAGE BUCKET ACCELERATOR TOPOLOGY HOSTS CHIPS; do
  [[ $# -gt 0 && -n "${!needed:-}" ]] || usage
done
export SLICES="${SLICES:-1}" MAX_RESTARTS="${MAX_RESTARTS:-100}" SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"

# Each word of the command stays one, whatever is in it, between YAML's double quotes. Kubernetes reads $$ as $.
manifest=$(python3 - "$here/gke/jobset.yaml" "$@" <<'PYTHON'
import os, pathlib, string, sys

def quoted(word):
    plain = lambda c: c.isascii() and c.isprintable() and c not in '"\\'
    return '"' + "".join(c if plain(c) else f"\\U{ord(c):08x}" for c in word.replace("$", "$$")) + '"'

spot = 'cloud.google.com/gke-spot: "true"' if os.environ.get("SPOT") == "1" else ""
given = os.environ | {"COMMAND": f"[{', '.join(map(quoted, sys.argv[2:]))}]", "SPOT": spot}
print(string.Template(pathlib.Path(sys.argv[1]).read_text()).substitute(given))
PYTHON
)
if [[ -n "$dry" ]]; then
  echo "kubectl apply -f - <<'END'"
  printf '%s\nEND\n' "$manifest"
  exit 0
fi

state() { kubectl get jobset "${NAME:?}" --ignore-not-found -o 'jsonpath={.status.terminalState}'; }
# A JobSet that has failed can't be started again: its run goes on in a new one.
if [[ "$(state)" == Failed ]]; then kubectl delete jobset "$NAME" --wait; fi
kubectl apply -f - <<<"$manifest"
shown=''
until ended=$(state) && [[ -n "$ended" ]]; do
  # Slice 0's first pod leads and prints; a restart makes a new one.
  pod=$(kubectl get pods --field-selector=status.phase=Running -o 'jsonpath={.items[*].metadata.name}' -l \
    "jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" || true)
  pod=${pod%% *}
  if [[ -n "$pod" && "$pod" != "$shown" ]]; then
    shown=$pod
    kubectl logs -f "$pod" -c jft || true
  else
    sleep "${POLL:-15}"
  fi
done
echo "launch: jobset $NAME has $ended" >&2
[[ "$ended" == Completed ]]
