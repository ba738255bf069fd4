#!/usr/bin/env bash
# Starts N processes of one run on this machine: launch/local.sh [--dry-run] N --config=FILE --workdir=DIR [flags]
# Each sees the CPU devices that XLA_FLAGS asks for. Ends with the first exit code that is not 0.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then dry_run=true; shift; fi
if [[ "${1:-}" == "--help" || ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh [--dry-run] NUMBER_OF_PROCESSES --config=FILE --workdir=DIR [flags of phijax.main]" >&2
  [[ "${1:-}" == "--help" ]] && exit 0 || exit 2
fi
count=$1; shift
port=${PORT:-12345}
venv="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python"  # what `make setup` made
python=${PYTHON:-$([[ -x "$venv" ]] && echo "$venv" || echo python3)}
command=("$python" -m phijax.main --coordinator_address="localhost:$port" --process_count="$count")

if $dry_run; then
  for ((id = 0; id < count; id++)); do echo "${command[*]} --process_id=$id $*"; done
  exit 0
fi

pids=()
for ((id = 0; id < count; id++)); do
  "${command[@]}" --process_id="$id" "$@" &
  pids+=($!)
done
# A stop of this script is a stop of the run: every process saves at the same step.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" && ended=0 || ended=$?
    if ! kill -0 "$pid" 2>/dev/null; then
      [[ $code -eq 0 ]] && code=$ended
      break
    fi
  done
done
exit "$code"
