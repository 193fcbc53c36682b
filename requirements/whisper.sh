#!/bin/sh
# The environment of a speech engine: whisper.sh FOLDER. Made once for a given list; safe to run again.
# PYTHON: the interpreter (python3).
set -eu
venv=$1
if ! command -v espeak-ng >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Speaks what is to be transcribed; without it, a tone is sent.
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends espeak-ng; } \
        >/dev/null || true
fi
here=$(cd "$(dirname "$0")" && pwd)
stamp=$venv/.complete-$(sha256sum <"$here/whisper.txt" | cut -c1-12)
[ -e "$stamp" ] && exit 0
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
[ -e "$stamp" ] && exit 0  # made by another meanwhile
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
uv=$here/../.venv/bin/uv
if [ -x "$uv" ] && "$uv" pip install --quiet --python "$venv/bin/python" --no-deps -r "$here/whisper.txt"; then
    :
else
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps -r "$here/whisper.txt"
fi
touch "$stamp"
