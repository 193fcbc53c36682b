"""The gateway's private certificate authorities: for engines, for their clients, and for the parts of its Ray.

Engines listen on a network with other users. So they serve TLS and require a client certificate of this
authority, and the edge requires theirs. The authority signs nothing but the certificates here: two for servers
(``engine.gateway``, the front door with the addresses that callers use), two for clients (``edge``,
``agent``), each valid for its own side only, so that a stolen engine key opens no engine.

Ray's own traffic has an authority of its own. Ray compares the address that it calls with the addresses in the peer's
certificate, and a block's address is known on its node alone: so every node reads that authority's key and signs for
itself. It is in no chain of the gateway's authority: a node cannot become engine, edge or front door by it.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, private_folder, write_private

ENGINE_NAME = "engine.gateway"
"""The name in every engine's certificate; clients verify it for any address of an engine."""
FRONT_NAME = "front.gateway"
"""The name in the front door's certificate; callers verify its address instead, which is also in it."""

_CA_LIFE = datetime.timedelta(days=3650)
_LIFE = datetime.timedelta(days=398)
_RENEW_BEFORE = datetime.timedelta(days=30)
_SKEW = datetime.timedelta(hours=1)
"""Certificates are valid from a time in the past: the clocks of a cluster's nodes differ."""


@dataclass(frozen=True)
class _Leaf:
    name: str
    certificate: Path
    key: Path
    """The same path as ``certificate`` where both lie in one PEM file."""
    server: bool
    hosts: tuple[str, ...] = ()
    """Names and addresses by which a client may verify the server, beside ``name``."""
    client: bool = False
    """For a server: the certificate is also valid as a client's, towards its peers."""


def make_authority(layout: Layout, now: datetime.datetime | None = None, front_hosts: tuple[str, ...] = ()) -> None:
    """Renew what is missing, broken or near its end (30 days) of the authority and its certificates; keep the rest.

    A new authority renews every certificate. All files are 0600. ``now`` is for tests. ``front_hosts``: names and
    addresses by which callers reach the front door; without any its certificate is left as it is.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    for folder in (layout.tls, layout.node):
        private_folder(folder)
    authority = _load(layout.ca, layout.ca_key)
    if authority is None or _near_end(authority[0], moment):
        authority = _new_authority(moment)
        _store(layout.ca, layout.ca_key, *authority)
    front = _Leaf(FRONT_NAME, layout.front_identity, layout.front_identity, server=True, hosts=front_hosts)
    for leaf in (*_leaves(layout), *((front,) if front_hosts else ())):
        found = _load(leaf.certificate, leaf.key)
        if (
            found is None
            or _near_end(found[0], moment)
            or not _signed_by(found[0], authority[0])
            or (leaf.server and _hosts_of(found[0]) != _alternatives(leaf))
        ):
            _store(leaf.certificate, leaf.key, *_new_leaf(leaf, authority, moment))


def _leaves(layout: Layout) -> tuple[_Leaf, ...]:
    return (
        _Leaf(ENGINE_NAME, layout.engine_certificate, layout.engine_key, server=True),
        _Leaf("edge", layout.edge_identity, layout.edge_identity, server=False),
        _Leaf("agent", layout.agent_identity, layout.agent_identity, server=False),
    )


def make_ray_authority(layout: Layout, keep: bool) -> None:
    """Renew the authority of Ray's traffic. ``keep``: only if it is missing or broken; living nodes trust it."""
    private_folder(layout.node)
    if not (keep and _load(layout.ray_ca, layout.ray_ca_key)):
        _store(layout.ray_ca, layout.ray_ca_key, *_new_authority(datetime.datetime.now(datetime.UTC)))


def sign_for_ray(layout: Layout, address: str, certificate: Path, key: Path) -> None:
    """Make the certificate of one node of Ray: for ``address`` and loopback, as a server and as a client.

    Raises:
        ServiceError: the authority's files are missing or broken.
    """
    authority = _load(layout.ray_ca, layout.ray_ca_key)
    if authority is None:
        raise ServiceError(f"{layout.ray_ca} and {layout.ray_ca_key} are no pair that can sign; 'gateway up' makes it.")
    leaf = _Leaf("localhost", certificate, key, server=True, hosts=(address, "127.0.0.1"), client=True)
    _store(certificate, key, *_new_leaf(leaf, authority, datetime.datetime.now(datetime.UTC)))


_Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _load(certificate: Path, key: Path) -> _Pair | None:
    """The pair on disk; ``None`` if it is missing, unreadable as PEM, or does not belong together."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != found.public_key():
        return None
    return found, private


def _store(certificate: Path, key: Path, found: x509.Certificate, private: ec.EllipticCurvePrivateKey) -> None:
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = found.public_bytes(serialization.Encoding.PEM)
    if certificate == key:
        write_private(certificate, public + secret)
        return
    write_private(key, secret)  # first, so that a certificate is beside another certificate's key only briefly
    write_private(certificate, public)


def _near_end(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    return certificate.not_valid_after_utc - now < _RENEW_BEFORE


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority(now: datetime.datetime) -> _Pair:
    private = ec.generate_private_key(ec.SECP256R1())
    # A name of its own, so that a certificate of an earlier authority is never searched under this one.
    name = _name(f"gateway authority {x509.random_serial_number():x}"[:64])
    certificate = (
        _builder(name, name, private.public_key(), now, _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(private, hashes.SHA256())
    )
    return certificate, private


def _new_leaf(leaf: _Leaf, authority: _Pair, now: datetime.datetime) -> _Pair:
    issuer, signer = authority
    private = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH] if leaf.server else []
    purposes += [ExtendedKeyUsageOID.CLIENT_AUTH] if leaf.client or not leaf.server else []
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(_name(leaf.name), issuer.subject, private.public_key(), now, _LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    if leaf.server:
        builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(leaf)), critical=False)
    return builder.sign(signer, hashes.SHA256()), private


def _alternatives(leaf: _Leaf) -> list[x509.GeneralName]:
    return [_general_name(host) for host in dict.fromkeys((leaf.name, *leaf.hosts))]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        names: Iterable[x509.GeneralName] = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        return []
    return list(names)
