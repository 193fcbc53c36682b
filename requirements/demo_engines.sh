#!/bin/sh
# What make demo-engines needs on Debian or Ubuntu, beside the environment: installed if this is root, else named.
set -eu
missing=
command -v espeak-ng >/dev/null || missing="$missing espeak-ng"
command -v ch-run >/dev/null || missing="$missing charliecloud"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "The demo of engines needs these Debian packages:$missing" >&2
    echo "  sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
