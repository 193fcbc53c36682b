#!/bin/sh
# Build the virtual environment: make_venv.sh FOLDER. Run by make; safe to run again (what is installed is kept).
# PYTHON: the interpreter (python3). TORCH_INDEX: an index to take torch from, such as PyTorch's own for CPU builds.
set -eu

venv=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
begun=$(date +%s)
log=$venv.log
step() { printf '[%3ss] %s\n' "$(($(date +%s) - begun))" "$*"; }
fail() { printf 'make_venv: %s\n' "$*" >&2; exit 1; }

# Debian packages: installed where we may, asked for where we may not.
debian() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        step "Debian packages: $*"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
            >"$log" 2>&1 </dev/null || { tail -n 5 "$log" >&2; fail "apt-get install $* failed; all of it is in $log"; }
    else
        fail "please install first: sudo apt-get install $*"
    fi
}

# A quiet command; when it fails, its last lines and where the rest is.
quietly() {
    "$@" >"$log" 2>&1 </dev/null || { tail -n 15 "$log" >&2; fail "'$1' failed; all of its output is in $log"; }
}

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    *) fail "the pinned list is for Linux on x86_64, this is $(uname -s) on $(uname -m)" ;;
esac
command -v "$python" >/dev/null || debian python3 python3-venv
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old: 3.11 or newer is needed (make PYTHON=/path/to/python3.11)"
"$python" -c 'import ensurepip' 2>/dev/null || debian python3-venv
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || debian libnuma1  # vLLM on CPU links it
free_mib=$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 {print $4}')
[ "$free_mib" -ge 4000 ] || [ -d "$venv" ] || fail "the environment takes 3 GB, $(dirname "$venv") has $free_mib MB free"

step "virtual environment in $venv ($("$python" --version))"
[ -x "$venv/bin/python" ] || quietly "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"

step "packages: $(grep -hc '^[a-zA-Z]' "$here/cpu.txt") to run, $(grep -hc '^[a-zA-Z]' "$here/dev.txt") to develop (700 MB to download)"
# uv fetches in parallel: ten seconds instead of minutes. It does not read pip's configuration; where only pip finds the
# way out (a mirror, a proxy), pip does it, slower.
if $pip install "uv==0.13.9" >"$log" 2>&1 </dev/null \
    && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps \
        -r "$here/cpu.txt" -r "$here/globus-client.txt" -r "$here/dev.txt" >>"$log" 2>&1 </dev/null; then
    :
else
    step "... with pip, some minutes"
    # shellcheck disable=SC2086
    quietly $pip install --no-deps -r "$here/cpu.txt" -r "$here/globus-client.txt" -r "$here/dev.txt"
fi

step "torch"
# shellcheck disable=SC2086
quietly $pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r "$here/torch.txt"

step "this project, editable"
# shellcheck disable=SC2086
quietly $pip install --no-deps --no-build-isolation -e "$here/.."
rm -f "$log"
step "environment complete"
