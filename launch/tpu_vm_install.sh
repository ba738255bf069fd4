#!/usr/bin/env bash
# Puts phijax, and if asked the shards, onto every worker of every slice of a TPU VM.
#
#   launch/tpu_vm_install.sh --name=NAME --zone=ZONE --ref=COMMIT --repository=URL      # one commit of a git repository
#   launch/tpu_vm_install.sh --name=NAME --zone=ZONE --wheel=dist/phijax_lm-0.1.0-py3-none-any.whl --experiment=FILE
#
#   --ref, --repository  the workers fetch exactly this commit or tag; experiments/ lies in it
#   --wheel              made by `pip wheel --no-deps .`; copied to the workers, for code that is not pushed anywhere
#   --experiment         a config file beside the wheel; then --config=experiments/FILE
#   --extras             of phijax (tpu,gcs)
#   --python             its version on the workers (3.12), brought by uv
#   --data-copy=gs://BUCKET/SHARDS --data-to=FOLDER   copies shards to the disk of every worker
#   --data-mount=BUCKET  --data-to=FOLDER             mounts a bucket there by gcsfuse instead
#   --project            as gcloud takes it
#   --dry-run            print what would be run
#
# Started again it brings the workers to the commit, wheel or shards that it is given then.
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

defaults="name= zone= ref= repository= wheel= experiment= extras=tpu,gcs python=3.12 data_copy= data_mount= data_to= project="
required="name zone"
read_flags "$@"
set_place

[[ -n "$ref$wheel" ]] || refuse "what code? --ref=COMMIT --repository=URL, or --wheel=FILE"
[[ -z "$ref" || -z "$wheel" ]] || refuse "--ref and --wheel exclude each other"
[[ -z "$ref" || -n "$repository" ]] || refuse "--ref needs --repository=URL"
[[ -z "$data_copy$data_mount" || -n "$data_to" ]] || refuse "--data-to=FOLDER is missing"
for file in "$wheel" "$experiment"; do
  [[ -z "$file" || -f "$file" ]] || refuse "$file is no file"
done

folder=$(dirname "${BASH_SOURCE[0]}")
files=("$folder/shell.sh" "$folder/on_worker.sh")
command=(bash on_worker.sh install --extras="$extras" --python="$python")
if [[ -n "$ref" ]]; then
  command+=(--ref="$ref" --repository="$repository")
else
  files+=("$wheel")
  command+=(--wheel="$(basename "$wheel")")
fi
if [[ -n "$experiment" ]]; then
  files+=("$experiment")
  command+=(--experiment="$(basename "$experiment")")
fi
copy_to_all_workers "${files[@]}"
on_all_workers "$(quoted "${command[@]}")"
if [[ -n "$data_copy" ]]; then on_all_workers "$(quoted bash on_worker.sh data --copy="$data_copy" --to="$data_to")"; fi
if [[ -n "$data_mount" ]]; then on_all_workers "$(quoted bash on_worker.sh data --mount="$data_mount" --to="$data_to")"; fi
