"""Who holds a port."""

from __future__ import annotations

import os
import socket

from gateway_plugin.service.listeners import Listener, bind_problem, listener_on, listening

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:18F6 00000000:0000 0A 00000000:00000000 00:00000000 00000000 65534        0 4711 1 0 100 0 0 10 0
   1: 0100007F:18F6 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     7        0 4712 1 0 20 4 30 10 -1
   2: 00000000:18F7 00000000:0000 0A 00000000:00000000 00:00000000 00000000     8        0 4713 1 0 100 0 0 10 0
"""


def test_the_kernel_tells_whose_a_strangers_socket_is() -> None:
    assert listening(TABLE, 6390) == {"4711": 65534}  # a connection on the same port is none, nor is the next port
    assert listening(TABLE, 6392) == {}


def test_a_port_in_use_is_told_with_process_and_user() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert listener_on(port) == Listener(os.getuid(), os.getpid())
        for host in ("127.0.0.1", "0.0.0.0"):
            problem = bind_problem(host, port) or ""
            assert problem.startswith(f"in use by pid {os.getpid()} of user ")
    assert bind_problem("127.0.0.1", port) is None
    assert listener_on(port) is None


def test_a_holder_that_cannot_be_seen_is_told_by_user() -> None:
    assert str(Listener(0, None)) == "user root (uid 0)"
    assert str(Listener(4_000_000, 17)) == "pid 17 of uid 4000000"


def test_an_address_of_another_machine_is_no_port_in_use() -> None:
    assert "192.0.2.77" in (bind_problem("192.0.2.77", 20011) or "")
