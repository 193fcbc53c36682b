"""Checks of a certificate that the site sets for the front door, from HAProxy's side and from the clients'."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.deployment import record_of
from gateway_plugin.site import Site

_NAME = "certificate"
_SOON = datetime.timedelta(days=21)


def certificate(site: Site, now: datetime.datetime | None = None) -> tuple[Check, ...]:
    """The problems of ``site.certificate``, or that it has none; nothing if the gateway makes its own.

    (1) It can be read and holds a certificate; (2) and its key, here or in ``FILE.key`` beside it, as HAProxy searches;
    (3) other users cannot read the key; (4) it is valid, and not about to expire; (5) the certificates after it are its
    chain; (6) it is for the name in the gateway's address.
    """
    file = site.certificate
    if file is None:
        return ()
    try:
        chain = x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:  # (1)
        return (_fail(f"{file} cannot be read: {error.strerror}", "'certificate' in the site file"),)
    except ValueError:
        return (
            _fail(f"{file} holds no certificate in PEM", "put the chain in it, the server's own first, and its key"),
        )
    found = [*_key(file, chain[0]), *_dates(chain[0], now or datetime.datetime.now(datetime.UTC)), *_chain(file, chain)]
    if (problem := _host(site, chain[0])) is not None:
        found.append(problem)
    until = f"{chain[0].not_valid_after_utc:%Y-%m-%d}"
    return tuple(found) or (Check(_NAME, Verdict.OK, f"{file}, valid until {until}"),)


def _fail(found: str, advice: str) -> Check:
    return Check(_NAME, Verdict.FAIL, found, advice, configuration=True)


def _key(file: Path, own: x509.Certificate) -> list[Check]:
    private: PrivateKeyTypes | None = None
    for place in (file, file.with_name(f"{file.name}.key")):
        try:
            private = serialization.load_pem_private_key(_key_block(place.read_bytes()), password=None)
        except TypeError:
            return [_fail(f"the key in {place} has a passphrase", "write it without one: it cannot be typed in")]
        except (OSError, ValueError):
            continue
        break
    if private is None:  # (2)
        return [_fail(f"{file} holds no private key, nor does {file.name}.key", "append the key to the certificates")]
    if private.public_key() != own.public_key():
        return [_fail(f"the key in {place} is not that of the first certificate in {file}", "the server's own first")]
    mode = stat.S_IMODE(place.stat().st_mode)
    if mode & 0o004 or mode & 0o022:  # (3)
        who = "others can read" if mode & 0o004 else "others can replace"
        return [
            _fail(f"{who} the key in {place} (mode {mode:o})", f"chmod 600 {place}; have it made anew if it matters")
        ]
    if mode & 0o040:
        words = f"the group can read the key in {place} (mode {mode:o})"
        return [Check(_NAME, Verdict.WARN, words, f"chmod 600 {place}, unless all of the group may be the gateway")]
    return []


def _key_block(text: bytes) -> bytes:
    """From the first private key on: only certificates precede it."""
    for line in text.splitlines():
        if line.startswith(b"-----BEGIN") and b"PRIVATE KEY" in line:
            return text[text.index(line) :]
    return b""


def _dates(own: x509.Certificate, now: datetime.datetime) -> list[Check]:
    until = own.not_valid_after_utc  # (4)
    if until <= now:
        return [_fail(f"expired on {until:%Y-%m-%d %H:%M} UTC", "have it renewed, then 'gateway down' and 'up'")]
    if own.not_valid_before_utc > now:
        words = f"not valid before {own.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        return [_fail(words, "wait, or see to this machine's clock")]
    if until - now < _SOON:
        words = f"expires on {until:%Y-%m-%d}, in {(until - now).days} days"
        return [Check(_NAME, Verdict.WARN, words, "have it renewed, then 'gateway down' and 'up'")]
    return []


def _chain(file: Path, chain: list[x509.Certificate]) -> list[Check]:
    for number, (lower, upper) in enumerate(pairwise(chain), 2):  # (5)
        try:
            lower.verify_directly_issued_by(upper)
        except (InvalidSignature, ValueError, TypeError):
            words = f"certificate {number} in {file} did not sign the one before it"
            return [_fail(words, "the server's own first, then who signed it, and so on")]
    top = chain[-1]
    if top.issuer != top.subject and not _known_here(top.issuer):
        words = f"who signed it ({top.issuer.rfc4514_string()}) is not in {file}, nor trusted by this machine"
        advice = "append the intermediate certificates, or give callers the authority's as GATEWAY_CA"
        return [Check(_NAME, Verdict.WARN, words, advice)]
    return []


def _known_here(authority: x509.Name) -> bool:
    """Whether this machine trusts an authority of that name."""
    wanted = frozenset(str(attribute.value) for attribute in authority)
    trusted: list[dict[str, Any]] = ssl.create_default_context().get_ca_certs()
    return any(wanted == {value for part in one["subject"] for _, value in part} for one in trusted)


def _host(site: Site, own: x509.Certificate) -> Check | None:
    host = urlsplit(record_of(site, site.name, Path(), "").url).hostname or ""
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        words = "it names no host (no subject alternative name): no caller can verify it"
        return _fail(words, "have it made with the names that callers use")
    known = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if any(_fits(host, name) for name in known):
        return None
    words = (
        f"it is for {', '.join(known) or 'no host'}, not for {host}, which 'up' and 'status' give as the address"  # (6)
    )
    advice = "callers set GATEWAY_URL to a name in it; 'bind' in the site file may be that name's address"
    return Check(_NAME, Verdict.WARN, words, advice)


def _fits(host: str, name: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        wanted, offered = host.lower().split("."), name.lower().split(".")
        if offered[0] == "*":  # one label, as in RFC 6125
            return len(wanted) == len(offered) and wanted[1:] == offered[1:]
        return wanted == offered
    try:
        return address == ipaddress.ip_address(name)
    except ValueError:
        return False
