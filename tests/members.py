"""Members that lie, on the real channel with the real key; a lie is a few lines.

`Member(cluster, backup)` speaks to the server of a host as the client of a backup would, and has no disk at all.
`serving(cluster, host, answer)` answers in the place of a host's server what a function says.
`between(cluster, client, host, change=...)` stands, for one client, before a real server and changes what it says:
change(request, answer) returns the answer to give, an object, bytes that are sent as they are, or None to hang up;
hello(hello) the first message, and stream(data) what comes of an rsync stream.
"""

import contextlib
import functools
import json
import os
import re
import select
import socket
import ssl
import threading

import cbackup
from tests.harness import read_file


@functools.lru_cache(maxsize=None)      # to make one takes longer than to use it
def context(pem, side=ssl.PROTOCOL_TLS_CLIENT):
    made = ssl.SSLContext(side)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    made.load_cert_chain(pem)
    return made


SAMPLE_AT = (0, 1 << 20)      # where a Member says that it has looked into a large copy


def sampled(data, at=SAMPLE_AT):
    """The samples' digest of a copy with these bytes."""
    digest = cbackup.new_digest()
    for offset in at:
        digest.update(data[offset:offset + cbackup.SAMPLE_BYTES])
    return digest.digest()


def digest_of(data):
    digest = cbackup.new_digest()
    digest.update(data)
    return digest.digest()


class Member:
    """What the client of `backup` may say to the server of the host `to`; the answers come as they are, refusals too."""

    def __init__(self, cluster, backup, source, to="s"):
        self.cluster, self.backup, self.source = cluster, backup, source
        stream = socket.create_connection(("127.0.0.1", cluster.ports[to]), 30)
        pem = cluster.home(cluster.backups[backup].host) + "/cluster.pem"
        self.channel = cbackup.Channel(context(pem).wrap_socket(stream))
        self.hello = self.channel.receive(30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def ask(self, op, **fields):
        """One request, with the backup and the source where the operation has them; None when the server hangs up."""
        shape = cbackup.OPERATIONS[op].request if op in cbackup.OPERATIONS else {}
        known = {"backup": self.backup, "source": self.source}
        self.channel.send(dict({key: known[key] for key in known if key in shape}, op=op, **fields))
        try:
            return self.channel.receive(60)
        except OSError:
            return None

    def begin(self, **fields):
        return self.ask("begin", **dict(dict(identity="aa" * 8, adopt=False, capacity=1 << 30, free=1 << 30, used=0, files=0,
                                             sums={}), **fields))

    def claim(self, *paths):
        """{path: version} of what it got."""
        rows = self.ask("claim_paths", free=1 << 30, paths=list(paths), relieved=None).get("rows", [])
        return {row[0]: row[6] for row in rows}

    def confirm(self, path, version, data, digest=None, samples=None):
        """The word for a copy with these bytes; `digest`, `samples`: what it says of them instead of the truth."""
        large = len(data) > cbackup.WHOLE_BELOW
        row = [path, version, (digest or digest_of(data)).hex(), list(SAMPLE_AT) if large else [],
               (samples or sampled(data)).hex() if large else ""]
        answer = self.ask("confirm", rows=[row])
        return answer["verdicts"][0] if answer.get("ok") else answer["error"]

    def placed(self, path, version, tag=1):
        return self.ask("placed", rows=[[path, version, tag]]).get("counted", [])

    def hold(self, *paths):
        """All that an honest client says of files that it has copied; returns those that count."""
        counted = []
        for path, version in self.claim(*paths).items():
            data = read_file("%s/%s" % (self.cluster.sources[self.source].path, path))
            if self.confirm(path, version, data) == "ok":
                counted += self.placed(path, version)
        return counted

    def drop(self, *paths):
        return self.ask("drop", paths=list(paths)).get("granted", [])


class Posing:
    """Listens in the place of a server, on `port`; a connection is a `converse(channel)` in a thread of its own."""

    def __init__(self, pem):
        self.pem, self.listener = pem, socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._guarded, args=self.listener.accept()[:1], daemon=True).start()

    def _guarded(self, stream):
        with contextlib.suppress(OSError, cbackup.ProtocolError), stream:
            stream.settimeout(30)
            tls = context(self.pem, ssl.PROTOCOL_TLS_SERVER).wrap_socket(stream, True)
            with contextlib.closing(cbackup.Channel(tls)) as channel:
                self.converse(channel)


class Serving(Posing):
    """Says `hello`, and answers what `answer(request)` returns, None to hang up; `asked` are the requests."""

    def __init__(self, pem, hello, answer):
        self.hello, self.answer, self.asked = hello, answer, []
        super().__init__(pem)

    def converse(self, channel):
        channel.send(self.hello)
        while True:
            request = channel.receive(30)
            answer = request and (self.asked.append(request) or self.answer(request))
            if not answer:
                return
            channel.send(answer)


@contextlib.contextmanager
def serving(cluster, host, answer=lambda request: None, name=None, **hello):
    """A Serving at the address of `host`, for all that read their configuration from now on; `name`: who it says it is."""
    said = dict({"cbackup": cbackup.PROTOCOL, "level": cbackup.LEVEL, "host": name or host, "books": "0" * 16,
                 "version": cbackup.__version__, "config": [0, 0, ""]}, **hello)
    with contextlib.closing(Serving(cluster.home(host) + "/cluster.pem", said, answer)) as server:
        before, cluster.ports[host] = cluster.ports[host], server.port
        try:
            yield server
        finally:
            cluster.ports[host] = before


class Liar(Posing):
    """Passes on what the server at the port `real` says, changed; hasty: rsync's first words in one packet with the answer."""

    def __init__(self, pem, real, change=lambda request, answer: answer, hello=lambda hello: hello, stream=None, hasty=False):
        self.real, self.change, self.hello, self.stream, self.hasty = real, change, hello, stream, hasty
        super().__init__(pem)

    def converse(self, near):
        plain = socket.create_connection(("127.0.0.1", self.real), 30)
        with contextlib.closing(cbackup.Channel(context(self.pem).wrap_socket(plain))) as far:
            self.pass_on(near, far)

    def pass_on(self, near, far):
        if not self.say(near, self.hello(far.receive(30))):
            return
        while True:
            request = near.receive(60)
            if request is None:
                return
            far.send(request)
            answer = far.receive(60)
            answer = self.change(request, answer)
            if self.hasty and request["op"] == "rsync":
                answer = json.dumps(answer).encode() + b"\n" + far.socket.recv(65536)
            if not self.say(near, answer):
                return
            if request.get("op") == "rsync" and (self.hasty or answer.get("ok")):
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
    with contextlib.closing(Liar(os.path.join(cluster.home(client), "cluster.pem"), cluster.ports[host], **options)) as liar:
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
