"""Members that say what they are told to: a scripted client and a scripted server, on the real channel with the real key.

`Member(cluster, backup)` speaks to the server of a host as the client of a backup would, and has no disk at all: a lie is a
request more or less. `serving(cluster, host, ...)` answers in the place of a host's server what a function says.
"""

import contextlib
import socket
import ssl
import threading

import cbackup
from tests.harness import read_file
from tests.liar import context

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


class Serving:
    """Answers in the place of a server: `answer(request)` returns the answer, or None to hang up; `asked` are the requests."""

    def __init__(self, pem, hello, answer):
        self.pem, self.hello, self.answer, self.asked = pem, hello, answer, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, cbackup.ProtocolError), stream:
                stream.settimeout(30)
                with contextlib.closing(cbackup.Channel(context(self.pem, ssl.PROTOCOL_TLS_SERVER).wrap_socket(
                        stream, True))) as channel:
                    self._converse(channel)

    def _converse(self, channel):
        channel.send(self.hello)
        while True:
            request = channel.receive(30)
            answer = request and (self.asked.append(request) or self.answer(request))
            if not answer:
                return
            channel.send(answer)

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


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
