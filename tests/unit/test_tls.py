"""The private authority: what its certificates are good for, and when they are made anew."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway_plugin.paths import Layout
from gateway_plugin.tls import make_authority, make_ray_authority, sign_for_ray

NOW = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    make_authority(made, NOW)
    return made


def files(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths(layout)}


def paths(layout: Layout) -> tuple[Path, ...]:
    return (*layout.tls.iterdir(), *layout.node.iterdir())


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_every_file_is_private(layout: Layout) -> None:
    assert set(files(layout)) == {*("ca.pem", "ca.key", "edge.pem", "agent.pem", "engine.crt", "engine.key")}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths(layout))
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (layout.tls, layout.node)} == {0o700}
    assert b"PRIVATE" not in layout.ca.read_bytes()


def test_a_nodes_folder_holds_what_a_node_needs_and_no_more(layout: Layout) -> None:
    assert {path.name for path in layout.node.iterdir()} == {"ca.pem", "agent.pem", "engine.crt", "engine.key"}
    assert layout.ray_token.parent == layout.node
    others = (layout.ca_key, layout.edge_identity, layout.edge_secret, layout.admin_key)
    assert all(layout.node not in path.parents for path in (*others, layout.keys_json, layout.slot_keys_map))


def test_the_folder_of_an_earlier_version_gets_new_files(layout: Layout) -> None:
    for path in (*layout.node.iterdir(),):
        path.rename(layout.tls / path.name)  # as they lay before
    layout.node.rmdir()
    make_authority(layout, NOW)
    assert len(tuple(layout.node.iterdir())) == 4
    read(layout.engine_certificate).verify_directly_issued_by(read(layout.ca))
    read(layout.edge_identity).verify_directly_issued_by(read(layout.ca))


def test_each_certificate_is_good_for_its_own_side_only(layout: Layout) -> None:
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    for path, purpose, names in (
        (layout.engine_certificate, server, ["engine.gateway"]),
        (layout.edge_identity, client, None),
        (layout.agent_identity, client, None),
    ):
        certificate = read(path)
        certificate.verify_directly_issued_by(read(layout.ca))
        extensions = certificate.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        assert (constraints.value.ca, constraints.critical) == (False, True)
        if names:
            found = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert found.get_values_for_type(x509.DNSName) == names
    authority = read(layout.ca).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (authority.ca, authority.path_length) == (True, 0)


def shake(server: tuple[Path, Path], client: Path, layout: Layout, name: str) -> None:
    """A handshake in memory. Raises ``ssl.SSLError``."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*server)
    serving.load_verify_locations(layout.ca)
    serving.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(layout.ca))
    calling.load_cert_chain(client)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        calling.wrap_bio(to_client, to_server, server_hostname=name),
        serving.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = [True, True]
    while any(waiting):
        for number, end in enumerate(ends):
            try:
                end.do_handshake()
                waiting[number] = False
            except ssl.SSLWantReadError:
                pass


@pytest.fixture
def valid_now(layout: Layout) -> Layout:
    """With certificates that this moment's clock accepts."""
    for path in paths(layout):
        path.unlink()
    make_authority(layout)
    return layout


def test_who_may_talk_to_whom(valid_now: Layout) -> None:
    layout = valid_now
    engine = (layout.engine_certificate, layout.engine_key)
    for identity in (layout.edge_identity, layout.agent_identity):
        shake(engine, identity, layout, "engine.gateway")
    with pytest.raises(ssl.SSLError):
        shake(engine, layout.edge_identity, layout, "front.gateway")
    both = layout.tls / "both.pem"
    both.write_bytes(layout.engine_certificate.read_bytes() + layout.engine_key.read_bytes())
    with pytest.raises(ssl.SSLError):
        shake(engine, both, layout, "engine.gateway")  # an engine is no client
    with pytest.raises(ssl.SSLError):
        shake((layout.edge_identity, layout.edge_identity), layout.edge_identity, layout, "engine.gateway")


def test_what_is_good_is_kept(layout: Layout) -> None:
    before = files(layout)
    make_authority(layout, NOW + datetime.timedelta(days=300))
    assert files(layout) == before


def test_near_their_end_certificates_are_made_anew_by_the_same_authority(layout: Layout) -> None:
    before = files(layout)
    make_authority(layout, NOW + datetime.timedelta(days=398 - 29))
    after = files(layout)
    assert after["ca.pem"] == before["ca.pem"]
    assert all(after[name] != before[name] for name in before if not name.startswith("ca."))


def test_a_new_authority_makes_everything_anew(layout: Layout) -> None:
    before = files(layout)
    make_authority(layout, NOW + datetime.timedelta(days=3650 - 29))
    assert all(content != before[name] for name, content in files(layout).items())


def test_what_is_missing_or_broken_is_made_anew(layout: Layout) -> None:
    before = files(layout)
    layout.engine_key.unlink()
    layout.edge_identity.write_text("nonsense")
    layout.agent_identity.write_bytes(before["agent.pem"].split(b"-----BEGIN EC")[0] + before["ca.key"])  # not its key
    make_authority(layout, NOW)
    after = files(layout)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"engine.key", "engine.crt", "edge.pem", "agent.pem"}


def for_ray(layout: Layout, address: str) -> tuple[Path, Path]:
    """A certificate of Ray's authority, and certificate and key in one file."""
    certificate, key = layout.state / f"{address}.crt", layout.state / f"{address}.key"
    sign_for_ray(layout, address, certificate, key)
    return certificate, key


def test_a_certificate_for_ray_is_good_for_both_sides_and_its_own_addresses(layout: Layout) -> None:
    make_ray_authority(layout, keep=False)
    certificate = read(for_ray(layout, "10.1.2.3")[0])
    certificate.verify_directly_issued_by(read(layout.ray_ca))
    extensions = certificate.extensions
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1"]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    named = read(for_ray(layout, "node1.cluster")[0]).extensions
    assert named.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == [
        *("localhost", "node1.cluster")
    ]


def test_whoever_can_sign_for_ray_becomes_neither_engine_nor_edge(valid_now: Layout) -> None:
    layout = valid_now
    make_ray_authority(layout, keep=False)
    certificate, key = for_ray(layout, "engine.gateway")
    both = layout.state / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    with pytest.raises(ssl.SSLError):
        shake((certificate, key), layout.edge_identity, layout, "engine.gateway")
    with pytest.raises(ssl.SSLError):
        shake((layout.engine_certificate, layout.engine_key), both, layout, "engine.gateway")


def test_ray_s_authority_is_kept_only_where_asked(layout: Layout) -> None:
    make_ray_authority(layout, keep=True)
    first = layout.ray_ca.read_bytes()
    make_ray_authority(layout, keep=True)
    assert layout.ray_ca.read_bytes() == first
    make_ray_authority(layout, keep=False)
    assert layout.ray_ca.read_bytes() != first
    assert stat.S_IMODE(layout.ray_ca_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(layout.node.stat().st_mode) == 0o700
