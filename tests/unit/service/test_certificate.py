"""A site's own certificate, as ``doctor`` and ``up`` look at it before HAProxy and callers do."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway_plugin.catalog import Catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.service.certificate import certificate
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.preflight import before_start
from gateway_plugin.site import Site
from tests.support.edges import edge_site

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
_Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def signed(name: str, by: _Pair | None = None, hosts: tuple[str, ...] = (), days: int = 90, begins: int = -1) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins * DAY)
        .not_valid_after(NOW + days * DAY)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key if by is None else by[1], hashes.SHA256()), key


AUTHORITY = signed("Somebody's Root")
HOSTS = ("127.0.0.1", "gpu.example.org")
GOOD = signed("gpu.example.org", AUTHORITY, HOSTS)


def pem(*parts: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    return b"".join(
        part.public_bytes(serialization.Encoding.PEM)
        if isinstance(part, x509.Certificate)
        else part.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        for part in parts
    )


def site(file: Path) -> Site:
    return edge_site(8180, certificate=file)


def looked(tmp_path: Path, content: bytes, mode: int = 0o600) -> tuple[Check, ...]:
    file = tmp_path / "front.pem"
    file.write_bytes(content)
    file.chmod(mode)
    return certificate(site(file), NOW)


def test_a_whole_chain_with_its_key_is_well_and_says_until_when(tmp_path: Path) -> None:
    (found,) = looked(tmp_path, pem(GOOD[0], AUTHORITY[0], GOOD[1]))
    assert (found.verdict, "2026-08-30" in found.found) == (Verdict.OK, True)
    (key_first,) = looked(tmp_path, pem(GOOD[1], GOOD[0], AUTHORITY[0]))
    assert key_first.verdict is Verdict.OK
    (tmp_path / "front.pem.key").write_bytes(pem(GOOD[1]))  # HAProxy looks there too
    (tmp_path / "front.pem.key").chmod(0o600)
    (beside,) = looked(tmp_path, pem(GOOD[0], AUTHORITY[0]))
    assert beside.verdict is Verdict.OK
    assert certificate(edge_site(8180), NOW) == ()


OTHER = signed("other", AUTHORITY, HOSTS)
MIDDLE = signed("Middle", AUTHORITY)
DEEP = signed("gpu.example.org", MIDDLE, HOSTS)


@pytest.mark.parametrize(
    ("content", "mode", "verdict", "says"),
    [
        (b"", 0o600, Verdict.FAIL, "holds no certificate"),
        (pem(GOOD[1]), 0o600, Verdict.FAIL, "holds no certificate"),
        (pem(GOOD[0], AUTHORITY[0]), 0o600, Verdict.FAIL, "no private key"),
        (pem(GOOD[0], AUTHORITY[0], OTHER[1]), 0o600, Verdict.FAIL, "not that of the first certificate"),
        (pem(AUTHORITY[0], GOOD[0], GOOD[1]), 0o600, Verdict.FAIL, "not that of the first certificate"),
        (pem(GOOD[0], AUTHORITY[0], GOOD[1]), 0o644, Verdict.FAIL, "others can read the key"),
        (pem(GOOD[0], AUTHORITY[0], GOOD[1]), 0o620, Verdict.FAIL, "others can replace"),
        (pem(GOOD[0], AUTHORITY[0], GOOD[1]), 0o640, Verdict.WARN, "the group can read the key"),
        (pem(DEEP[0], AUTHORITY[0], MIDDLE[0], DEEP[1]), 0o600, Verdict.FAIL, "certificate 2 in"),
        (pem(DEEP[0], DEEP[1]), 0o600, Verdict.WARN, "who signed it (CN=Middle) is not in"),
        (pem(*signed("a", None, HOSTS, days=0)), 0o600, Verdict.FAIL, "expired on 2026-06-01"),
        (pem(*signed("a", None, HOSTS, days=20)), 0o600, Verdict.WARN, "in 20 days"),
        (pem(*signed("a", None, HOSTS, begins=1)), 0o600, Verdict.FAIL, "not valid before 2026-06-02"),
        (pem(*signed("a")), 0o600, Verdict.FAIL, "names no host"),
        (pem(*signed("a", None, ("gpu.example.org",))), 0o600, Verdict.WARN, "it is for gpu.example.org, not for 127"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_haproxy_or_a_caller_says_it(
    tmp_path: Path, content: bytes, mode: int, verdict: Verdict, says: str
) -> None:
    found = looked(tmp_path, content, mode)[0]
    assert (found.verdict, says in found.found, bool(found.advice)) == (verdict, True, True), found


@pytest.mark.parametrize(
    ("bind", "hosts", "well"),
    [
        ("gpu.example.org", ("*.example.org",), True),
        ("GPU.example.org", ("gpu.example.org",), True),
        ("a.gpu.example.org", ("*.example.org",), False),
        ("10.0.0.1", ("10.0.0.1",), True),
        ("10.0.0.1", ("10.0.0.2", "*.0.0.1"), False),
    ],
)
def test_a_certificate_is_for_the_gateways_own_address(
    tmp_path: Path, bind: str, hosts: tuple[str, ...], well: bool
) -> None:
    file = tmp_path / "front.pem"
    file.write_bytes(pem(*signed("a", None, hosts)))
    file.chmod(0o600)
    (found,) = certificate(site(file).model_copy(update={"bind": bind}), NOW)
    assert (found.verdict is Verdict.OK) == well


@pytest.mark.process
def test_a_missing_file_is_told_by_up_too_and_nothing_is_made(tmp_path: Path) -> None:
    file = tmp_path / "none.pem"
    (found,) = certificate(site(file), NOW)
    assert (found.verdict, f"{file} cannot be read" in found.found) == (Verdict.FAIL, True)
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read"):
        before_start(Layout(tmp_path / "state"), site(file), Catalog(models=()))
    assert not (tmp_path / "state").exists()
