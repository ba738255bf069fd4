#!/usr/bin/env bash
# What happens on one machine of a pod. tpu_vm_install.sh and tpu_vm_run.sh copy this file there and call it.
#
#   on_worker.sh install (--ref=COMMIT --repository=URL | --wheel=FILE) [--extras=tpu,gcs] [--python=3.12] [--experiment=FILE]
#   on_worker.sh data    (--copy=gs://BUCKET/SHARDS | --mount=BUCKET) --to=FOLDER
#   on_worker.sh start   --run=NAME [--verb=main] -- FLAGS OF PHIJAX
#   on_worker.sh stop    --run=NAME
#   on_worker.sh log     --run=NAME
#
# install puts phijax at exactly one commit, or one wheel, into ~/phijax/.venv.
# start leaves the run by itself, so that a lost connection does not end it, and shows its log until it ends; called
# again while it runs it shows the log again. Its exit code is the run's. The log: ~/phijax-runs/NAME/log.
# stop asks the run to save and end (exit code 75).
# shellcheck disable=SC2154,SC2329  # read_flags sets what `defaults` names; the last lines call functions by name
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

verb_here=${1:-}
if [[ $# -gt 0 ]]; then shift; fi
if [[ -z "$verb_here" || "$verb_here" == --help ]]; then help_text; exit 0; fi
defaults="ref= repository= wheel= extras=tpu,gcs python=3.12 experiment= copy= mount= to= run= verb=main"
required=
read_flags "$@"
home=~/phijax
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/on_worker.sh

install() {
  local uv=(python3 -m uv) source folder
  for folder in ~/phijax-runs/*/; do
    if alive "$folder"; then say "${folder} runs: what it runs on is left as it is"; return; fi
  done
  if $dry_run || ! python3 -m uv --version > /dev/null 2>&1; then run python3 -m pip install --quiet --user uv; fi
  run mkdir -p "$home"
  if [[ -n "$ref" ]]; then
    [[ -n "$repository" ]] || refuse "--ref needs --repository=URL"
    [[ -d "$home/source/.git" ]] || run git clone --quiet --no-checkout "$repository" "$home/source"
    run git -C "$home/source" fetch --quiet "$repository" "$ref"
    run git -C "$home/source" checkout --quiet --force --detach FETCH_HEAD
    source="$home/source[$extras]"
  elif [[ -n "$wheel" ]]; then
    run rm -rf "$home/source"  # a run starts in it where it is there, and Python would take phijax from it
    source="$HOME/$(basename "$wheel")[$extras]"
  else
    refuse "what code? --ref=COMMIT --repository=URL, or --wheel=FILE"
  fi
  [[ -d "$home/.venv" ]] || run "${uv[@]}" venv --quiet --python="$python" "$home/.venv"
  run "${uv[@]}" pip install --quiet --python="$home/.venv/bin/python" --reinstall-package=phijax-lm "$source"
  if [[ -n "$experiment" ]]; then run mkdir -p "$home/experiments"; run cp "$HOME/$(basename "$experiment")" "$home/experiments/"; fi
  run "$home/.venv/bin/python" -c "import phijax, jax; print('phijax with jax', jax.__version__)"
}

data() {
  [[ -n "$to" ]] || refuse "--to=FOLDER is missing"
  run sudo mkdir -p "$to"
  run sudo chown "$(id -u):$(id -g)" "$to"
  if [[ -n "$copy" ]]; then
    run gcloud storage rsync "$copy" "$to" --recursive
  elif [[ -n "$mount" ]]; then
    if mountpoint -q "$to"; then say "$to is mounted already"; return; fi
    $dry_run || command -v gcsfuse > /dev/null || refuse "gcsfuse is not on this machine: install it, or copy (--data-copy)"
    # ArrayRecord reads at random: a cache of whole files on the local disk, filled as they are touched.
    run gcsfuse --implicit-dirs -o ro --cache-dir=/tmp/gcsfuse --file-cache-max-size-mb=-1 \
      --file-cache-cache-file-for-range-read "$mount" "$to"
  else
    refuse "--copy=gs://BUCKET/SHARDS or --mount=BUCKET"
  fi
}

start() {
  [[ -n "$run" ]] || refuse "--run=NAME is missing"
  local busy
  if [[ "$verb" == preflight ]] && ! $dry_run; then
    for busy in ~/phijax-runs/*/; do
      # Its chips are taken, so a check would fail; a babysitter that is started again must not take that for a verdict.
      if [[ "$busy" != */"$run"/ ]] && alive "$busy"; then say "$busy runs: nothing is checked beside it"; exit 0; fi
    done
  fi
  local folder=~/phijax-runs/$run python=${PHIJAX_PYTHON:-$home/.venv/bin/python} pid code
  local command=("$python" -m "phijax.$verb" "${rest[@]}")
  if $dry_run; then quoted "${command[@]}"; echo; return; fi
  mkdir -p "$folder"
  if ! alive "$folder"; then
    rm -f "$folder/exit_code" "$folder/pid"
    if [[ -e "$folder/log" ]]; then mv "$folder/log" "$folder/log.$(date -u +%Y%m%dT%H%M%S)"; fi
    cd "$([[ -d "$home/source" ]] && echo "$home/source" || echo "$home")"
    # A session of its own: what hangs up the connection does not reach it.
    setsid "$BASH" "$here" supervise --run="$run" -- "${command[@]}" > "$folder/log" 2>&1 < /dev/null &
    while [[ ! -s "$folder/pid" && ! -e "$folder/exit_code" ]]; do sleep 0.1; done
  fi
  pid=$(cat "$folder/pid")
  tail --lines=+1 --follow --pid="$pid" "$folder/log" || true
  code=$(cat "$folder/exit_code" 2> /dev/null) || code=1  # killed together with its session
  exit "$code"
}

# Between `start` and the run: keeps its exit code where `start` finds it, also when it is called again.
supervise() {
  local folder=~/phijax-runs/$run code=0
  "${rest[@]}" &
  echo $! > "$folder/run_pid"
  echo $$ > "$folder/pid"
  wait $! || code=$?
  echo "$code" > "$folder/exit_code.new"
  mv "$folder/exit_code.new" "$folder/exit_code"
}

alive() { [[ -s "$1/pid" && ! -e "$1/exit_code" ]] && kill -0 "$(cat "$1/pid")" 2> /dev/null; }

stop() {
  [[ -n "$run" ]] || refuse "--run=NAME is missing"
  local folder=~/phijax-runs/$run
  if $dry_run; then quoted kill -TERM "\$(cat $folder/run_pid)"; echo; return; fi
  if alive "$folder"; then kill -TERM "$(cat "$folder/run_pid")"; else say "$run does not run here"; fi
}

log() { [[ -n "$run" ]] || refuse "--run=NAME is missing"; run cat ~/phijax-runs/"$run"/log; }

{  # read to its end before it is run: another installation may overwrite this file under a run
  case "$verb_here" in
    install | data | start | supervise | stop | log) "$verb_here" ;;
    *) refuse "$verb_here is none of install, data, start, stop, log" ;;
  esac
  exit
}
