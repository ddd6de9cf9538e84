"""A member that lies: it stands between clients and a real server, holds the cluster's key, and changes what is said.

`Liar(pem, port, change)` listens on a port of its own (`liar.port`; write that into a client's configuration) and passes
on what the server at `port` says: change(request, answer) is called for each answer, and returns the one to give: an
object, bytes that are sent as they are, or None to hang up.  For an rsync stream `stream(data)` may change what comes.
"""

import contextlib
import json
import os
import re
import select
import socket
import ssl
import threading

import cbackup


def context(pem, side=ssl.PROTOCOL_TLS_CLIENT):
    made = ssl.SSLContext(side)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    made.load_cert_chain(pem)
    return made


class Liar:
    def __init__(self, pem, port, change=lambda request, answer: answer, hello=lambda hello: hello, stream=None):
        self.pem, self.real, self.change, self.hello, self.stream = pem, port, change, hello, stream
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def serve(self):
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.guarded, args=(stream,), daemon=True).start()

    def guarded(self, stream):
        with contextlib.suppress(OSError, cbackup.ProtocolError), stream:
            stream.settimeout(30)
            near = cbackup.Channel(context(self.pem, ssl.PROTOCOL_TLS_SERVER).wrap_socket(stream, True))
            far = cbackup.Channel(context(self.pem).wrap_socket(socket.create_connection(("127.0.0.1", self.real), 30)))
            with contextlib.closing(near), contextlib.closing(far):
                self.converse(near, far)

    def converse(self, near, far):
        if not self.say(near, self.hello(far.receive(30))):
            return
        while True:
            request = near.receive(60)
            if request is None:
                return
            far.send(request)
            answer = far.receive(60)
            if not self.say(near, self.change(request, answer)):
                return
            if request.get("op") == "rsync" and answer.get("ok"):
                self.relay(near.socket, far.socket)
                return

    @staticmethod
    def say(near, answer):
        if isinstance(answer, bytes):
            near.socket.sendall(answer)
        elif answer is not None:
            near.send(answer)
        return answer is not None

    def relay(self, near, far):
        """From a single thread, as a TLS connection wants it, and until both sides have ended."""
        ends = {near: far, far: near}
        for one in (near, far):
            one.settimeout(60)
        while ends:
            ready = [one for one in ends if one.pending()] or select.select(list(ends), [], [], 60)[0]
            if not ready:
                return
            for source in ready:
                data, target = source.recv(65536), ends[source]
                if data:
                    target.sendall(self.stream(data) if self.stream and source is far else data)
                else:
                    del ends[source]
                    # The socket's own: that of SSLSocket would go on without TLS.
                    socket.socket.shutdown(target, socket.SHUT_WR)


@contextlib.contextmanager
def between(cluster, client, host, **options):
    """A Liar that stands, for the client host `client`, in the place of the server of `host`."""
    home = os.path.join(cluster.home(client), "cbackup.conf")
    before = cluster.config()
    with Liar(os.path.join(cluster.home(client), "cluster.pem"), cluster.ports[host], **options) as liar:
        text, count = re.subn(r"(?m)^%s = 127\.0\.0\.1:\d+$" % host, "%s = 127.0.0.1:%d" % (host, liar.port), before)
        assert count == 1, before
        liar.config = text
        yield liar


def one_pass(cluster, client, config):
    """A client's pass in this process, with a configuration's text that is not in its home."""
    home = cbackup.Home(cluster.home(client))
    parsed = cbackup.parse_config(config, "test")
    worker = cbackup.Client(home, parsed, client, cbackup.Progress(quiet=True))
    worker.exchange_config = lambda *_: None
    return worker.run()


def copy(answer):
    return json.loads(json.dumps(answer))


__all__ = ["Liar", "between", "copy", "one_pass"]
