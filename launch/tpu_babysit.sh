#!/usr/bin/env bash
# Keeps a run going on TPU capacity that may be taken away: creates, installs, runs, and does so again until it is done.
#
#   launch/tpu_babysit.sh --name=NAME --zone=ZONE --type=v5litepod-256 --spot --ref=COMMIT --repository=URL \
#     -- --config=experiments/mini.py --workdir=gs://BUCKET/RUN
#
#   Flags of launch/tpu_vm_create.sh (--type --slices --version --spot --reserved --network --subnetwork
#   --service-account) and of launch/tpu_vm_install.sh (--ref --repository --wheel --experiment --extras --python
#   --data-copy --data-mount --data-to), and:
#   --max-crashes        give up after so many in a row (3)
#   --healthy-minutes    a life of this length makes the count begin anew (60)
#   --preflight          `phijax preflight` before each first start on new machines
#   --delete             give the machines back when the run is done or given up
#   --run, --project     as for launch/tpu_vm_run.sh
#   --dry-run            print what would be run in a first life
#
# What ends a life:   0    done                          -> exit 0
#                     2    a mistake in the config       -> exit 2, nothing is tried again
#                     75   stopped on request            -> started again
#                     preempted (SUSPENDED, FAILED, ...; a machine PREEMPTED) -> deleted, created, installed, started again
#                     anything else                      -> a crash: started again, --max-crashes times, then exit 1
# A gcloud that does not answer is asked again, PATIENCE (120) times in a row once it has answered; then exit 1, machines
# and run left as they are.
# Ctrl-C leaves machines and run as they are; started again it takes up where they are. POLL_SECONDS (30),
# SETTLE_SECONDS (60): how long after the end of a life it is decided whether the machines were taken away.
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
source "$folder/shell.sh"

create_flags="type= slices=1 version= spot=false reserved=false network= subnetwork= service_account="
install_flags="ref= repository= wheel= experiment= extras=tpu,gcs python=3.12 data_copy= data_mount= data_to="
defaults="name= zone= project= $create_flags $install_flags \
max_crashes=3 healthy_minutes=60 preflight=false delete=false run=train"
required="name zone type"
read_flags "$@"
((${#rest[@]})) || refuse "the flags of the run are missing: ... -- --config=FILE --workdir=gs://BUCKET/RUN"
settle_seconds=${SETTLE_SECONDS:-60}
set_place

# Flags of these names that are set, as the other scripts take them.
chosen() {
  local pair key
  for pair in "$@"; do
    key=${pair%%=*}
    if [[ "${!key}" == true ]]; then printf '%s\0' "--${key//_/-}"; continue; fi
    if [[ -n "${!key}" && "${!key}" != false ]]; then printf '%s\0' "--${key//_/-}=${!key}"; fi
  done
}
common=(--name="$name" --zone="$zone")
if [[ -n "$project" ]]; then common+=(--project="$project"); fi
if $dry_run; then common+=(--dry-run); fi
# shellcheck disable=SC2086  # lists of words
mapfile -d '' create < <(chosen $create_flags)
# shellcheck disable=SC2086
mapfile -d '' install < <(chosen $install_flags)

remove() { run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }
install_all() { "$folder/tpu_vm_install.sh" "${common[@]}" "${install[@]}"; }
check_all() { "$folder/tpu_vm_run.sh" "${common[@]}" --verb=preflight --run=preflight -- "${rest[@]}"; }
start_all() { "$folder/tpu_vm_run.sh" "${common[@]}" --run="$run" -- "${rest[@]}"; }

leave() {
  say "$2"
  if $delete; then remove || say "the machines could not be given back: look yourself"; fi
  exit "$1"
}

crashes=0
crashed() {
  crashes=$((crashes + 1))
  say "crash $crashes of $max_crashes: $1"
  if ((crashes >= max_crashes)); then leave 1 "given up after $crashes crashes in a row"; fi
}

if $dry_run; then
  "$folder/tpu_vm_create.sh" "${common[@]}" "${create[@]}"
  install_all
  if $preflight; then check_all; fi
  start_all
  if $delete; then remove; fi
  exit 0
fi

is_there() { look; [[ "$state" == ACTIVE ]]; }

new=true  # machines that we have not installed on
silent=0
patience=$max_crashes
while true; do
  look
  case "$state" in
    UNKNOWN)
      # The run goes on without us, so an evening without network must not end it, let alone give its machines back.
      silent=$((silent + 1))
      if ((silent >= patience)); then say "gcloud does not answer: machines and run are left as they are"; exit 1; fi
      sleep "$settle_seconds"
      continue
      ;;
    *) silent=0 patience=${PATIENCE:-120} ;;
  esac
  case "$state" in
    ABSENT)
      say "asking for $type"
      new=true
      "$folder/tpu_vm_create.sh" "${common[@]}" "${create[@]}" --no-wait || crashed "the request was refused"
      sleep "$poll_seconds"
      continue
      ;;
    FAILED | SUSPENDING | SUSPENDED | PREEMPTED)
      say "$name is $state: giving it back to ask anew"
      if [[ "$state" == FAILED ]]; then crashed "the request failed"; fi
      remove || say "not removed yet"
      sleep "$poll_seconds"
      continue
      ;;
    ACTIVE) ;;
    *) new=true; sleep "$poll_seconds"; continue ;;  # in the queue, being made, repaired, deleted
  esac

  code=0
  began=$SECONDS
  if $new; then
    if ! install_all; then
      sleep "$settle_seconds"
      if is_there; then crashed "the installation failed"; fi
      continue
    fi
    new=false
    if $preflight; then check_all || code=$?; fi
    if ((code)); then
      sleep "$settle_seconds"
      if is_there; then leave 2 "preflight failed with code $code; see its table above"; fi
      continue
    fi
  fi
  say "starting the run"
  start_all || code=$?
  if ((SECONDS - began >= healthy_minutes * 60)); then crashes=0; fi
  case "$code" in
    0) leave 0 "done" ;;
    2) leave 2 "the run refused its config or command (exit code 2); see its message above" ;;
    75) say "stopped on request; starting it again" ;;
    *)
      sleep "$settle_seconds"  # a preemption shows here a little later than in the run
      if is_there; then crashed "exit code $code"; else say "exit code $code, and the machines are $state"; fi
      ;;
  esac
done
