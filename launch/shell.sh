#!/usr/bin/env bash
# What the scripts beside this one share; they source it. Copy the whole folder: it needs nothing else of phijax.
#
#   defaults="name= zone= slices=1 spot=false"   # the flags of a script, hyphens in them as underscores
#   required="name zone"
#   read_flags "$@"                              # --name=X -> $name; --spot -> $spot is true; behind -- : "${rest[@]}"

# shellcheck disable=SC2154  # `defaults`, `required` and the flags are the calling script's
dry_run=false
rest=()
# shellcheck disable=SC2034  # of the scripts that wait
poll_seconds=${POLL_SECONDS:-30}

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the head of the script is its help.
help_text() { awk 'NR > 1 { if (!/^#/) exit; if (/^# shellcheck /) next; sub(/^# ?/, ""); print }' "$0"; }

read_flags() {
  local pair argument key
  for pair in $defaults; do printf -v "${pair%%=*}" '%s' "${pair#*=}"; done
  while (($#)); do
    argument=$1
    shift
    case "$argument" in
      --help | -h) help_text; exit 0 ;;
      --dry-run) dry_run=true ;;
      --) rest=("$@"); break ;;
      --*)
        key=${argument#--}
        key=${key%%=*}
        key=${key//-/_}
        [[ " $defaults" == *" $key="* ]] || refuse "there is no flag $argument. --help lists them; flags of phijax come behind --"
        if [[ "$argument" == *=* ]]; then printf -v "$key" '%s' "${argument#*=}"; else printf -v "$key" true; fi
        ;;
      *) refuse "$argument is no flag. --help lists them; flags of phijax come behind --" ;;
    esac
  done
  for key in ${required:-}; do [[ -n "${!key}" ]] || refuse "--${key//_/-}=... is missing. --help says what it is."; done
}

# check_name FLAG NAME LONGEST [FIRST]: a label of DNS, which clusters and clouds want; FIRST: what it may begin with.
check_name() {
  local LC_ALL=C first=${4:-a-z}
  [[ "$2" =~ ^[$first]([-a-z0-9]*[a-z0-9])?$ ]] \
    || refuse "--$1=$2 holds what a name cannot: it is of lower-case letters, digits and hyphens, with ${first//-/ to } first and no hyphen last"
  ((${#2} <= $3)) || refuse "--$1=$2 has ${#2} characters; at most $3 are taken"
}

check_number() { [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "--$1=$2 is not a number"; }

quoted() { local text; printf -v text '%q ' "$@"; printf '%s' "${text% }"; }

# Does a command, or prints it as it could be pasted.
run() { if $dry_run; then quoted "$@"; echo; else "$@"; fi; }

# --- TPU VMs: one name, one zone, as many slices as there are behind it

set_place() {
  place=(--zone="$zone")
  if [[ -n "$project" ]]; then place+=(--project="$project"); fi
  describe_queue=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
  list_machines=(gcloud compute tpus tpu-vm list "${place[@]}"
    --filter="queuedResource~/queuedResources/$name\$" --format='value(state)')
}

# Sets `answer` to what a command says on stdout, `complaint` to the rest: gcloud announces its updates there.
ask() {
  local errors code=0
  errors=$(mktemp)
  answer=$("$@" 2> "$errors") || code=$?
  complaint=$(< "$errors")
  rm -f "$errors"
  return "$code"
}

# Sets `state` to that of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, ...; ABSENT: there is none; UNKNOWN: gcloud
# does not answer. Where it is ACTIVE but a machine is not READY, `state` is that machine's: a slice can be gone while its
# request still counts as ACTIVE, and gcloud's ssh then goes to the other slices alone.
look() {
  local machine
  state=UNKNOWN
  if ask "${describe_queue[@]}"; then state=$answer; elif [[ "$complaint" == *NOT_FOUND* ]]; then state=ABSENT; fi
  if [[ "$state" == ACTIVE ]]; then
    if ! ask "${list_machines[@]}"; then state=UNKNOWN; answer=; fi
    for machine in $answer; do
      case "$machine" in
        READY) ;;
        PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) state=PREEMPTED ;;
        *) if [[ "$state" == ACTIVE ]]; then state=$machine; fi ;;
      esac
    done
  fi
  if [[ "$state" == UNKNOWN ]]; then say "gcloud: $complaint"; fi
}

# One command line on every worker of every slice; the exit code is that of the first worker that failed.
on_all_workers() { run gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all --batch-size=all --command="$1"; }

copy_to_all_workers() { run gcloud compute tpus queued-resources scp "$@" "$name:" "${place[@]}" --node=all --worker=all --batch-size=all; }
