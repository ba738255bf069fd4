#!/usr/bin/env bash
# Runs training on every worker of a TPU VM slice:
#   launch/tpu_vm_run.sh [--dry-run] TPU_NAME ZONE --config=FILE --workdir=gs://BUCKET/RUN [flags of phijax.main]
# JAX finds the other hosts of the slice by itself. The checkout must lie at ~/phijax on the workers, set up by
# `make setup` with the tpu extra. Exit code 75 means: stopped on request, start the same command again.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then dry_run=true; shift; fi
if [[ "${1:-}" == "--help" || $# -lt 3 ]]; then
  echo "usage: launch/tpu_vm_run.sh [--dry-run] TPU_NAME ZONE --config=FILE --workdir=DIR [flags of phijax.main]" >&2
  [[ "${1:-}" == "--help" ]] && exit 0 || exit 2
fi
name=$1; zone=$2; shift 2
printf -v flags '%q ' "$@"
remote="cd ~/phijax && .venv/bin/python -m phijax.main ${flags% }"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")

if $dry_run; then
  printf '%q ' "${command[@]}"; echo
  exit 0
fi
exec "${command[@]}"
