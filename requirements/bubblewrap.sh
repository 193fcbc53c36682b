#!/bin/sh
# What isolates engines, on Debian or Ubuntu: installed if this is root, else named.
set -eu
command -v bwrap >/dev/null && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Isolated engines need this Debian package: bubblewrap" >&2
    echo "  sudo apt-get install --no-install-recommends bubblewrap" >&2
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap >/dev/null
