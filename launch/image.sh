#!/usr/bin/env bash
# Builds an image of one commit, and pushes it: launch/image.sh --for=tpu --image=REGION-docker.pkg.dev/P/R/phijax [--push]
#
#   --for     tpu, gpu or cpu: launch/docker/Dockerfile.FOR
#   --image   its name; the tag is the commit
#   --ref     which commit of this checkout (HEAD); what is not committed is not in it
#   --push    send it to its registry
#   --dry-run print what would be run
# shellcheck disable=SC2154  # read_flags sets what `defaults` names
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$folder/shell.sh"

defaults="for= image= ref=HEAD push=false"
required="for image"
read_flags "$@"
[[ -f "$folder/docker/Dockerfile.$for" ]] || refuse "--for=$for must be tpu, gpu or cpu"
commit=$(git -C "$folder" rev-parse --short=12 "$ref^{commit}") || refuse "--ref=$ref is no commit of this checkout"
name="$image:$for-$commit"

# From git, not from the folder: the image holds what the tag says.
if $dry_run; then
  echo "git -C $(quoted "$folder/..") archive $commit | docker build --file=launch/docker/Dockerfile.$for --tag=$(quoted "$name") -"
else
  git -C "$folder/.." archive "$commit" | docker build --file="launch/docker/Dockerfile.$for" --tag="$name" -
fi
if $push; then run docker push "$name"; fi
say "$name"
