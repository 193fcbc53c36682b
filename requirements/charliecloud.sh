#!/bin/sh
# What runs a container in the tests, on Debian or Ubuntu: installed if this is root, else named.
set -eu
command -v ch-run >/dev/null && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "The tests of containers need this Debian package: charliecloud" >&2
    echo "  sudo apt-get install --no-install-recommends charliecloud" >&2
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends charliecloud >/dev/null
