#!/usr/bin/env bash
# Runs on every worker: mounts the share and installs the library, with locked dependencies, into
# ./venv. Can be repeated.
#   bash install.sh WHEEL LOCK HOST:/FOLDER MOUNT
set -euo pipefail
wheel=$1 lock=$2 share=$3 mount=$4

if ! mountpoint -q "$mount"; then
    # A new worker updates itself, and meanwhile holds apt's lock.
    sudo apt-get -q -o DPkg::Lock::Timeout=600 update
    sudo apt-get -q -o DPkg::Lock::Timeout=600 install -y nfs-common
    sudo mkdir -p "$mount"
    sudo mount -t nfs "$share" "$mount"
    test -w "$mount" || sudo chmod a+rwx "$mount" # only root can write to a new share
fi

# The image's own Python is too old for the library; uv installs another.
uv=$HOME/.local/bin/uv
test -x "$uv" || python3 -m pip install -q --user uv==0.13.9
test -x venv/bin/python || "$uv" venv -q --python 3.11 venv
"$uv" pip sync -q --require-hashes --python venv/bin/python "$lock"
"$uv" pip install -q --no-deps --python venv/bin/python "./$wheel"
