#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A TPU VM, one host or a pod slice, by a queued resource; spot by default; made again and gone on with until done.
#
#   NAME=mine ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket launch/tpu_vm.sh [--dry-run] \
#       jft train --config=configs/sft.py:llama3.1-8b --config.data.train=/mnt/bucket/train.jsonl \
#       --config.run_dir=/mnt/bucket/runs/mine --config.batch_size=16
#
# The committed files of this repository go to each host, the bucket is mounted at /mnt/bucket: run_dir must lie there, for
# a preempted host's disk is lost. SPOT=0 asks for on-demand, RUNTIME for another image. RETRIES (3) bounds failures
# without a preemption. Ends with jft's exit code and deletes the slice; when interrupted, the run goes on there, and the
# same line follows it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { awk 'NR > 2 && !/^#( |$)/ {exit} NR > 2 {sub(/^# ?/, ""); print}' launch/tpu_vm.sh >&2; exit 2; }
dry=''
if [[ "${1:-}" == --dry-run ]]; then dry=1; shift; fi
[[ $# -gt 0 && -n "${NAME:-}" && -n "${ZONE:-}" && -n "${TYPE:-}" && -n "${BUCKET:-}" ]] || usage
case "$TYPE" in
  v5lite*) image=v2-alpha-tpuv5-lite ;;
  v5p*) image=v2-alpha-tpuv5 ;;
  v6e*) image=v2-alpha-tpuv6e ;;
  v4* | v3* | v2*) image=tpu-ubuntu2204-base ;;
  *) echo "launch: $TYPE: not a type of TPU VM (tpu7x is to be had through GKE only: launch/gke.sh)" >&2; exit 2 ;;
esac
spot=''
if [[ "${SPOT:-1}" == 1 ]]; then spot=--spot; fi

# The images' Python is too old; uv brings another. orbax renames the folder of a finished checkpoint: gcsfuse may.
# shellcheck disable=SC2016 # it is the hosts that expand this
setup='set -e
mkdir -p jft && tar xzf jft.tgz -C jft && cd jft
command -v gcsfuse >/dev/null || {
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
mountpoint -q /mnt/bucket || {
  sudo mkdir -p /mnt/bucket && sudo chown "$USER" /mnt/bucket
  gcsfuse --implicit-dirs --rename-dir-limit=200000 '"$(printf %q "$BUCKET")"' /mnt/bucket
}
python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install -q -p .venv/bin/python -e ".[train,tpu]"'
# Runs apart from the connection, which may break: what is started already, and has not ended, is followed.
start="cd jft && export PATH=\$PWD/.venv/bin:\$PATH
[[ ! -e code ]] && kill -0 \"\$(cat pid 2>/dev/null)\" 2>/dev/null || {
  rm -f code; (nohup $(printf '%q ' "$@"); echo \$? >code) >log 2>&1 </dev/null & echo \$! >pid
}
tail -n +1 -f --pid=\"\$(cat pid)\" log; echo jft-ended-with \"\$(cat code 2>/dev/null || echo 75)\""

run() { if [[ -n "$dry" ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
queued() { run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on_all() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }
create() { queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$image}" ${spot:+"$spot"}; }
copy() {
  run git archive --format=tar.gz -o "${TMPDIR:-/tmp}/jft.tgz" HEAD
  run gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/jft.tgz" "$NAME:" --zone="$ZONE" --worker=all
}
remove() { queued delete --force --quiet; }
if [[ -n "$dry" ]]; then create; copy; on_all "$setup"; on_all "$start"; remove; exit 0; fi

# The worst of the codes that the hosts tell; 2 (bad input) before all; 75 where one could not tell, as when it is lost.
code_of() {
  local codes
  codes=$(grep -o 'jft-ended-with [0-9]*' "$1" | cut -d' ' -f2 | sort -n)
  if grep -qx 2 <<<"$codes"; then echo 2; elif [[ $2 -ne 0 || -z "$codes" ]]; then echo 75; else tail -n1 <<<"$codes"; fi
}
failures=0 code=75 log=$(mktemp)
until [[ $code -eq 0 || $code -eq 2 || $failures -gt ${RETRIES:-3} ]]; do
  state=$(queued describe --format='value(state.state)' 2>/dev/null || true)
  case "$state" in
    ACTIVE)
      told=0
      { copy && on_all "$setup" && on_all "$start"; } 2>&1 | tee "$log" || told=$?
      code=$(code_of "$log" "$told")
      if [[ $code -ne 0 ]]; then failures=$((failures + 1)); sleep "${POLL:-30}"; fi ;;
    '') create ;;
    FAILED | SUSPENDED | SUSPENDING) echo "launch: $NAME is $state; making it again" >&2; failures=0; remove ;;
    *) echo "launch: $NAME is $state" >&2; sleep "${POLL:-30}" ;;
  esac
done
remove
exit "$code"
