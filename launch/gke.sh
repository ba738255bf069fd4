#!/usr/bin/env bash
# Starts a run on a GKE cluster with TPU node pools, as a JobSet; needs kubectl that is connected to the cluster.
#
#   launch/gke.sh --name=mini --image=IMAGE --tpu=v5e --topology=16x16 [--slices=2] [--queue=phijax] \
#     -- --config=experiments/mini.py --workdir=gs://BUCKET/RUN
#   launch/gke.sh --kueue --tpu=v5e --topology=16x16 --slices=2 --queue=phijax     # once: a queue with that much quota
#   launch/gke.sh --name=mini --delete                                             # SIGTERM: it saves, then ends
#
#   --image            from launch/image.sh; the code and its experiments/ are in it
#   --tpu, --topology  v5e, v5p or v6e; chips a slice, such as 16x16 or 4x4x8
#   --slices           as many slices joined over the data centre network (set mesh.slices to it)
#   --queue            of Kueue: the run waits until all its chips are free
#   --spot             on spot nodes; being preempted is not counted as a crash
#   --max-restarts     crashes until it is given up (5); exit code 2 ends it at once, 75 starts it again for ever
#   --grace-seconds    between SIGTERM and SIGKILL (600); longer than a save
#   --data-bucket=B --data-to=/data   mounts a bucket with shards, read only, by gcsfuse
#   --service-account  of Kubernetes, which may read and write the buckets (default)
#   --namespace        (default)
#   --verb             another command than main, such as preflight
#   --dry-run          print the YAML and the command that would apply it
#
# Logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME --prefix, and Cloud Logging keeps them.
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
source "$folder/shell.sh"

defaults="name= image= tpu= topology= slices=1 queue= spot=false max_restarts=5 grace_seconds=600 data_bucket= data_to= \
service_account=default namespace=default verb=main kueue=false delete=false"
required=
read_flags "$@"

check_name namespace "$namespace" 63 a-z0-9
if $delete; then
  [[ -n "$name" ]] || refuse "--name=... is missing"
  check_name name "$name" 63
  run kubectl delete jobset "$name" --namespace="$namespace"
  exit 0
fi

case "$tpu" in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *) refuse "--tpu=$tpu must be v5e, v5p or v6e" ;;
esac
[[ "$topology" =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || refuse "--topology=$topology is meant as 16x16 or 4x4x8"
[[ "$slices" =~ ^[1-9][0-9]{0,5}$ ]] || refuse "--slices=$slices is not a number of slices"
chips=$((${topology//x/*}))
# Hosts of a slice have four chips; the smallest slices are one host with all of them.
per_host=$((chips < 4 ? chips : 4))
hosts=$((chips / per_host))
((hosts * per_host == chips)) || refuse "--topology=$topology has $chips chips, which hosts of $per_host do not make"

json_strings() {
  local text out=
  for text in "$@"; do
    text=${text//\\/\\\\}
    out+="${out:+, }\"${text//\"/\\\"}\""
  done
  printf '[%s]' "$out"
}

# fill FILE NAME=VALUE...: the file with @NAME@ replaced; values are checked, since they land in YAML.
fill() {
  local text pair value
  text=$(< "$1")
  shift
  for pair in "$@"; do
    value=${pair#*=}
    [[ "${pair%%=*}" == ARGS || "$value" =~ ^[A-Za-z0-9./:@_-]*$ ]] || refuse "${pair%%=*}: $value holds what a name cannot"
    text=${text//"@${pair%%=*}@"/"$value"}
  done
  printf '%s\n' "$text"
}

without() { sed "/# only with $1\$/d"; }
labelled() { if [[ -n "$2" && "$2" != false ]]; then cat; else without "$1"; fi; }

check_number max-restarts "$max_restarts"
check_number grace-seconds "$grace_seconds"
[[ -z "$queue" ]] || check_name queue "$queue" 63 a-z0-9

if $kueue; then
  [[ -n "$queue" ]] || refuse "--queue=... is missing"
  yaml=$(fill "$folder/gke/kueue.yaml" ACCELERATOR="$accelerator" TOPOLOGY="$topology" QUEUE="$queue" \
    NAMESPACE="$namespace" ALL_CHIPS=$((chips * slices)))
else
  for key in name image; do [[ -n "${!key}" ]] || refuse "--$key=... is missing"; done
  ((${#rest[@]})) || refuse "the flags of phijax.$verb are missing: ... -- --config=FILE --workdir=gs://BUCKET/RUN"
  # JobSet names its Jobs and their pods so, and Kubernetes takes 63 characters.
  behind="-slice-$((slices - 1))-$((hosts - 1))-abcde"
  check_name name "$name" $((63 - ${#behind}))
  [[ -z "$data_bucket" || "$data_bucket" =~ ^[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]$ ]] \
    || refuse "--data-bucket=$data_bucket is meant as the name alone, without gs:// and folders"
  [[ -z "$data_bucket" || "$data_to" == /* ]] || refuse "--data-bucket needs --data-to=/FOLDER"
  yaml=$(fill "$folder/gke/jobset.yaml" NAME="$name" NAMESPACE="$namespace" QUEUE="$queue" SLICES="$slices" HOSTS="$hosts" \
    MAX_RESTARTS="$max_restarts" SERVICE_ACCOUNT="$service_account" GRACE_SECONDS="$grace_seconds" \
    ACCELERATOR="$accelerator" TOPOLOGY="$topology" IMAGE="$image" VERB="$verb" CHIPS="$per_host" \
    DATA_TO="$data_to" DATA_BUCKET="$data_bucket" ARGS="$(json_strings "${rest[@]}")" \
    | labelled --queue "$queue" | labelled --spot "$spot" | labelled --data-bucket "$data_bucket")
fi
if $dry_run; then
  printf '%s\n' "kubectl apply --filename=- <<'YAML'" "$yaml" YAML
else
  kubectl apply --filename=- <<< "$yaml"
fi
