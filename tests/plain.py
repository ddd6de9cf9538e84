"""The program with nothing but TLS taken out: for tests that open so many connections that handshakes would be most of
their cost.  `Cluster(..., file=plain.__file__)` runs servers and commands so; `plain.taken_out()` does it in this process.

In the place of the handshake the client says one byte, since a server looks at no connection that says nothing.
"""

import socket
import sys
from unittest import mock

import tests  # noqa: F401  (so that what comes next is compiled already)
import cbackup


class Connection(socket.socket):
    def do_handshake(self):
        assert self.recv(1) == b"\x16"

    def getpeercert(self, binary_form=False):
        return b"a member's"


class Context:
    def wrap_socket(self, connection, server_side=False, do_handshake_on_connect=True):
        timeout = connection.gettimeout()
        made = Connection(fileno=connection.detach())
        made.settimeout(timeout)
        if not server_side:
            made.sendall(b"\x16")
        return made


def taken_out():
    return mock.patch.object(cbackup, "tls_context", lambda home, server_side: Context())


if __name__ == "__main__":
    with taken_out():
        sys.exit(cbackup.main())
