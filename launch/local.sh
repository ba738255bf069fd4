#!/usr/bin/env bash
# Starts N processes of one run on this machine:
#
#   launch/local.sh 4 --config=experiments/tiny.py --workdir=build/four
#   launch/local.sh --verb=preflight 4 --workdir=build/four
#   launch/local.sh [--dry-run] [--verb=main] NUMBER_OF_PROCESSES [flags of phijax.main]
#
# Each sees the CPU devices that XLA_FLAGS asks for; on a machine with GPUs one process sees them all, so say 1. Ends
# with the first exit code that is not 0; SIGTERM and Ctrl-C are passed on. PORT (12345): of process 0. PYTHON: which.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/shell.sh"

verb=main
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    --help | -h) help_text; exit 0 ;;
    --dry-run) dry_run=true ;;
    --verb=*) verb=${1#--verb=} ;;
    *) refuse "$1 comes before the number of processes. --help says how." ;;
  esac
  shift
done
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || refuse "how many processes? launch/local.sh 4 --config=FILE --workdir=DIR"
count=$1
shift
venv="$here/../.venv/bin/python"  # what `make setup` made
python=${PYTHON:-$([[ -x "$venv" ]] && echo "$venv" || echo python3)}
command=("$python" -m "phijax.$verb" --coordinator_address="localhost:${PORT:-12345}" --process_count="$count")

if $dry_run; then
  for ((id = 0; id < count; id++)); do run "${command[@]}" --process_id="$id" "$@"; done
  exit 0
fi

pids=()
for ((id = 0; id < count; id++)); do
  "${command[@]}" --process_id="$id" "$@" &
  pids+=($!)
done
# A stop of this script is a stop of the run: every process saves at the same step.
interrupted=false
trap 'interrupted=true; kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  while $interrupted; do  # the signal ended the wait, not the process
    interrupted=false
    again=0
    wait "$pid" || again=$?
    if [[ $again -ne 127 ]]; then ended=$again; fi  # 127: it had been waited for
  done
  if [[ $code -eq 0 ]]; then code=$ended; fi
done
exit "$code"
