#!/usr/bin/env bash
# Runs a phijax command on every worker of every slice of a TPU VM, after launch/tpu_vm_install.sh:
#
#   launch/tpu_vm_run.sh --name=NAME --zone=ZONE -- --config=experiments/mini.py --workdir=gs://BUCKET/RUN
#   launch/tpu_vm_run.sh --name=NAME --zone=ZONE --verb=preflight -- --config=... --workdir=gs://BUCKET/RUN
#   launch/tpu_vm_run.sh --name=NAME --zone=ZONE --stop          # all save at the same step and end with 75
#   launch/tpu_vm_run.sh --name=NAME --zone=ZONE --logs=FOLDER   # each worker's log into FOLDER/SLICE/WORKER.log
#
#   --run      a name for it on the workers (train): its log is ~/phijax-runs/RUN/log there
#   --slices   how many there are, for --logs (1)
#   --project  as gcloud takes it
#   --dry-run  print what would be run
#
# The run goes on when this script or its connection dies; called again it shows the log of the run that is there. JAX
# finds the other hosts, of several slices too. Exit codes: those of phijax: 0 done, 1 crash, 2 your error, 75 stopped,
# start it again.
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

defaults="name= zone= verb=main run=train stop=false logs= slices=1 project="
required="name zone"
read_flags "$@"
set_place

if $stop; then
  on_all_workers "$(quoted bash on_worker.sh stop --run="$run")"
elif [[ -n "$logs" ]]; then
  for ((slice = 0; slice < slices; slice++)); do
    run mkdir -p "$logs/$slice"
    run gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node="$slice" --worker=all --batch-size=all \
      --output-directory="$logs/$slice" --command="$(quoted bash on_worker.sh log --run="$run")"
  done
else
  ((${#rest[@]})) || refuse "the flags of phijax.$verb are missing: ... -- --config=FILE --workdir=gs://BUCKET/RUN"
  on_all_workers "$(quoted bash on_worker.sh start --run="$run" --verb="$verb" -- "${rest[@]}")"
fi
