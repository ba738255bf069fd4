#!/usr/bin/env bash
# Asks for TPU VMs by a queued resource and waits until they are there.
#
#   launch/tpu_vm_create.sh --name=NAME --zone=ZONE --type=v5p-128 [--slices=2] [--spot | --reserved] [--dry-run]
#
#   --type            accelerator type: v5litepod-256, v5p-256 (cores), v6e-256
#   --slices          as many of them, joined over the data centre network (set mesh.slices to it)
#   --version         TPU software; by default the one for the type
#   --spot            cheaper, may be taken away at any time: launch/tpu_babysit.sh brings it back
#   --reserved        from your reservation
#   --valid-until-duration  give up waiting in the queue after this long, such as 6h
#   --network --subnetwork --service-account --project   as gcloud takes them
#   --no-wait         return when the request is made
#   --dry-run         print what would be run
#
# Exit codes: 0 they are there, 1 they will not come, 2 a mistake in the flags. POLL_SECONDS (30): how often it looks.
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

defaults="name= zone= type= slices=1 version= spot=false reserved=false valid_until_duration= network= subnetwork= \
service_account= project= no_wait=false"
required="name zone type"
read_flags "$@"
set_place

[[ "$slices" =~ ^[1-9][0-9]*$ ]] || refuse "--slices=$slices is not a number of slices"
[[ "$spot" == false || "$reserved" == false ]] || refuse "--spot and --reserved exclude each other"
if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) refuse "--type=$type: which software? Give --version=... (gcloud compute tpus tpu-vm versions list)" ;;
  esac
fi

command=(gcloud compute tpus queued-resources create "$name" "${place[@]}"
  --accelerator-type="$type" --runtime-version="$version")
if ((slices > 1)); then command+=(--node-count="$slices" --node-prefix="$name"); else command+=(--node-id="$name"); fi
if $spot; then command+=(--spot); fi
if $reserved; then command+=(--reserved); fi
for key in valid_until_duration network subnetwork service_account; do
  if [[ -n "${!key}" ]]; then command+=("--${key//_/-}=${!key}"); fi
done
run "${command[@]}"
if $no_wait; then exit 0; fi
if $dry_run; then
  run "${describe_queue[@]}"
  run "${list_machines[@]}"
  exit 0
fi

last=
while true; do
  look
  if [[ "$state" != "$last" ]]; then say "$name: $state"; fi
  last=$state
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | PREEMPTED | DELETING | ABSENT)
      say "$name will not come ($state). Why: gcloud compute tpus queued-resources describe $(quoted "$name" "${place[@]}")"
      exit 1
      ;;
  esac
  sleep "$poll_seconds"
done
