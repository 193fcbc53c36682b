"""Who holds a port."""

from __future__ import annotations

import itertools
import os
import socket
from ipaddress import ip_address

import pytest

from gateway_plugin.service.listeners import Listener, bind_problem, in_the_way, listener_on, listening

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:18F6 00000000:0000 0A 00000000:00000000 00:00000000 00000000 65534        0 4711 1 0 100 0 0 10 0
   1: 0100007F:18F6 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     7        0 4712 1 0 20 4 30 10 -1
   2: 00000000:18F7 00000000:0000 0A 00000000:00000000 00:00000000 00000000     8        0 4713 1 0 100 0 0 10 0
"""
TABLE6 = """\
  sl  local_address remote_address st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode
   0: 00000000000000000000000000000000:18F6 00000000000000000000000000000000:0000 0A 0:0 00:0 0 9 0 4714 1
   1: 00000000000000000000000001000000:18F7 00000000000000000000000000000000:0000 0A 0:0 00:0 0 9 0 4715 1
"""


def test_the_kernel_tells_whose_a_strangers_socket_is() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        assert listening(TABLE, 6390, host) == {"4711": 65534}  # a connection on the port is none, nor is the next port
    assert listening(TABLE, 6390, "192.0.2.1") == {}
    assert listening(TABLE, 6391, "192.0.2.1") == {"4713": 8}
    assert listening(TABLE, 6392, "0.0.0.0") == {}
    assert listening(TABLE6, 6390, "127.0.0.1") == {"4714": 9}
    assert listening(TABLE6, 6391, "0.0.0.0") == {}


@pytest.mark.parametrize(
    ("other", "host", "is_in_the_way"),
    [
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "127.0.0.1", True),
        ("::", "0.0.0.0", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("::1", "127.0.0.1", False),
        ("::1", "0.0.0.0", False),
        ("0.0.0.0", "::1", False),
        ("::1", "::", True),
    ],
)
def test_a_listener_on_an_address_of_its_own_is_in_nobodys_way(other: str, host: str, is_in_the_way: bool) -> None:
    assert in_the_way(ip_address(other), host) is is_in_the_way


def test_the_kernel_agrees_on_who_is_in_the_way() -> None:
    for other, host in itertools.product(("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::"), ("127.0.0.1", "0.0.0.0")):
        family = socket.AF_INET6 if ":" in other else socket.AF_INET
        with socket.socket(family) as taken:
            try:
                taken.bind((other, 0))
            except OSError:
                continue  # no IPv6 on this machine
            taken.listen()
            port = taken.getsockname()[1]
            assert (bind_problem(host, port) is not None) == (listener_on(port, host) is not None), (other, host)


def test_a_port_in_use_is_told_with_process_and_user() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert listener_on(port, "127.0.0.1") == Listener(os.getuid(), os.getpid())
        for host in ("127.0.0.1", "0.0.0.0"):
            problem = bind_problem(host, port) or ""
            assert problem.startswith(f"in use by pid {os.getpid()} of user ")
    assert bind_problem("127.0.0.1", port) is None
    assert listener_on(port, "127.0.0.1") is None


def test_a_holder_that_cannot_be_seen_is_told_by_user() -> None:
    assert str(Listener(0, None)) == "user root (uid 0)"
    assert str(Listener(4_000_000, 17)) == "pid 17 of uid 4000000"


def test_an_address_of_another_machine_is_no_port_in_use() -> None:
    assert "192.0.2.77" in (bind_problem("192.0.2.77", 20011) or "")
