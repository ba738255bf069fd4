#!/usr/bin/env bash
# Starts a run through xpk, on a cluster that `xpk cluster create` made (pip install xpk in an environment of its own).
#
#   launch/xpk.sh --name=mini --cluster=CLUSTER --zone=ZONE --image=IMAGE --tpu-type=v5litepod-256 [--slices=2] \
#     -- --config=experiments/mini.py --workdir=gs://BUCKET/RUN
#
#   --image         from launch/image.sh
#   --tpu-type      as xpk names it: v5litepod-256, v5p-256, v6e-256
#   --slices        as many of them (set mesh.slices to it)
#   --spot          on spot capacity
#   --max-restarts  (50) crashes and stops; exit code 2 ends it at once
#   --project       as gcloud takes it
#   --dry-run       print what would be run
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

defaults="name= cluster= zone= image= tpu_type= slices=1 spot=false max_restarts=50 project="
required="name cluster zone image tpu_type"
read_flags "$@"
check_name name "$name" 40  # as xpk itself
check_name cluster "$cluster" 40
[[ "$slices" =~ ^[1-9][0-9]{0,5}$ ]] || refuse "--slices=$slices is not a number of slices"
check_number max-restarts "$max_restarts"
((${#rest[@]})) || refuse "the flags of the run are missing: ... -- --config=FILE --workdir=gs://BUCKET/RUN"

command=(xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --docker-image="$image"
  --tpu-type="$tpu_type" --num-slices="$slices" --max-restarts="$max_restarts"
  # xpk starts again on 42 and 127 to 255 by itself; not on 2, which is the user's error.
  "--restart-on-exit-codes=1,75")
if [[ -n "$project" ]]; then command+=(--project="$project"); fi
if $spot; then command+=(--spot); fi
run "${command[@]}" --command="$(quoted python -m phijax.main "${rest[@]}")"
