#!/bin/sh
# What a RabbitMQ of the tests' own on this machine needs, on Debian or Ubuntu: installed if this is root, else named.
set -eu
dpkg-query -W -f '${Status}\n' rabbitmq-server 2>/dev/null | grep -q '^install ok installed$' && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "The Globus Compute tests need a real RabbitMQ, from this Debian package: rabbitmq-server" >&2
    echo "  sudo apt-get install --no-install-recommends rabbitmq-server" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# The broker that the package would start is not wanted: the tests start their own, in a folder of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends rabbitmq-server >/dev/null
