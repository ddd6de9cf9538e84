"""The one open port: who is let in, and that nothing a peer does takes a server down or holds others up.

The messages between client and server are no part of the contract, so these tests do not know them. Where a real
request is needed, they take one from a real client: `Tap` sits between a client and its server and writes down what
passes. All that is assumed is what any peer sees: TLS, one JSON object a line each way, the server speaks first.
"""

import contextlib
import itertools
import json
import os
import select
import socket
import ssl
import threading
import time
import unittest
import warnings

from tests.harness import PATIENCE, Case, Cluster, listening, new_cluster_pem, write_file

CUT_OFF = 45        # seconds after which a peer that is not served must have been cut off
AT_ONCE = 10        # seconds in which an honest peer must be served, whatever others do


def tls_context(pem, side=ssl.PROTOCOL_TLS_CLIENT, prove=True):
    """A TLS context for a peer with this cluster.pem, which it shows if `prove`."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    context.load_verify_locations(pem)
    if prove:
        context.load_cert_chain(pem)
    return context


def line_of(stream, timeout=AT_ONCE):
    """The next line from a TLS stream; b"" at its end."""
    stream.settimeout(timeout * PATIENCE)
    data = b""
    while not data.endswith(b"\n"):
        one = stream.recv(1)
        if not one:
            break
        data += one
    return data


def answer_until_cut_off(stream, timeout=CUT_OFF):
    """All that a peer sends until it closes the connection; fails when it keeps it open for longer than `timeout`."""
    data, end = b"", time.monotonic() + timeout * PATIENCE
    while True:
        stream.settimeout(max(0.01, end - time.monotonic()))
        try:
            more = stream.recv(65536)
        except socket.timeout:
            raise AssertionError("not cut off after %g s; received: %r" % (timeout * PATIENCE, data[:1000]))
        except OSError:
            return data
        if not more:
            return data
        data += more


class Tap:
    """Stands between clients and a server, both of which take it for the other, and keeps the clients' first lines.

    `requests` holds one list of lines for each connection, without what follows once a connection is no longer text.
    """

    def __init__(self, pem, port, listener):
        self.port, self.listener = port, listener
        self.server_side, self.client_side = tls_context(pem, ssl.PROTOCOL_TLS_SERVER), tls_context(pem)
        self._seen = []
        threading.Thread(target=self.serve, daemon=True).start()

    @property
    def requests(self):
        return [self.lines(bytes(seen)) for seen in self._seen]

    def serve(self):
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.relay, args=(stream,), daemon=True).start()

    def relay(self, stream):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stream.settimeout(20)
            near = stack.enter_context(self.server_side.wrap_socket(stream, True))
            far = stack.enter_context(self.client_side.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 20)))
            seen = bytearray()
            self._seen.append(seen)
            while True:
                ready = [one for one in (near, far) if one.pending()] or select.select([near, far], [], [], 60)[0]
                if not ready:
                    return
                for one in ready:
                    one.settimeout(20)
                    data = one.recv(65536)
                    if not data:
                        return
                    if one is near and len(seen) < 1 << 20:
                        seen += data
                    (far if one is near else near).sendall(data)

    @staticmethod
    def lines(data):
        """The lines at the start of `data` that are JSON objects."""
        result = []
        for line in data.split(b"\n"):
            try:
                good = isinstance(json.loads(line.decode("utf-8")), dict)
            except ValueError:
                good = False
            if not good:
                break
            result.append(line + b"\n")
        return result


class ChannelCase(Case):
    """One cluster for all: a source on s, whose server is attacked, and a backup on a."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", replicas=1)
        cls.path = cls.c.source("docs", "s", {"f": b"1", "big": 100000})
        cls.c.backup("b1", "a", "10M")
        cls.c.start()
        cls.c.settle()
        cls.port = cls.c.ports["s"]
        cls.pem = os.path.join(cls.c.home("a"), "cluster.pem")
        cls.context = tls_context(cls.pem)
        cls.count = 0

    def connect(self, timeout=AT_ONCE):
        return socket.create_connection(("127.0.0.1", self.port), timeout * PATIENCE)

    @contextlib.contextmanager
    def member(self):
        """A TLS stream of a peer that has the right cluster.pem and has heard the server's first line."""
        with self.connect() as plain, self.context.wrap_socket(plain) as stream:
            self.greeting = line_of(stream)
            self.assertIsInstance(json.loads(self.greeting.decode()), dict)
            yield stream

    def assertServes(self, timeout=AT_ONCE):
        """The server that was there before still is, and an honest client's pass is served in time."""
        type(self).count += 1
        name = "new%d" % self.count
        write_file(os.path.join(self.path, name), name)
        server = self.c.servers["s"]
        self.assertTrue(server.running, "the server is gone")
        result = self.c.client("a", timeout=timeout)
        self.assertRc(0, result)
        self.assertEqual((1, []), (result.json["copied_files"], result.json["unreachable"]))
        self.assertEqual(["b1"], self.c.copies_on_disk("docs")[name])
        self.assertNotIn("Traceback", server.stderr)


WAITS = "cbackup.HANDSHAKE_TIMEOUT = min(cbackup.HANDSHAKE_TIMEOUT, %g)" % (5 * PATIENCE)


class SilenceTest(ChannelCase):
    """Who says nothing, or stops in the middle, costs nobody more than the time limit, on either side of the port.

    The waiting is done once for all: setUpClass starts what must come to an end, and each test looks at its part.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        cls.peers = [cls.stack.enter_context(socket.create_connection(("127.0.0.1", cls.port))) for _ in range(100)]
        for peer in cls.peers[:50]:
            peer.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")        # the head of a ClientHello
        other = cls.stack.enter_context(Cluster("s", "silent", "babbler", "a", replicas=1))
        for host in ("s", "silent", "babbler"):
            other.source("docs-" + host, host, {"f": b"1"})
        other.backup("b1", "a", "1M")
        other.start("s", "a")
        other.ports["silent"], cls.silent = cls.stack.enter_context(listening())
        other.ports["babbler"], listener = cls.stack.enter_context(listening())
        threading.Thread(target=cls.babble, args=(listener,), daemon=True).start()
        cls.other, cls.client = other, other.spawn("a", "client", "--json", CBACKUP_TEST_BEFORE=WAITS)

    @staticmethod
    def babble(listener):
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return
            with stream, contextlib.suppress(OSError):
                stream.sendall(b"220 mail.example.org ESMTP\r\n" * 1000)

    def test_honest_peers_are_served_while_others_are_silent(self):
        self.assertServes()
        result = self.c.run("a", "status", "--json", timeout=AT_ONCE)
        self.assertEqual("ok", result.json["sources"]["docs"]["state"])

    def test_silent_peers_are_cut_off(self):
        for peer in self.peers:
            answer_until_cut_off(peer)
        self.assertServes()

    def test_a_client_goes_on_without_a_server_that_says_nothing_or_babbles(self):
        result = self.client.wait()
        self.assertRc(1, result)
        self.assertEqual(["babbler", "silent"], sorted(result.json["unreachable"]))
        self.assertEqual(1, result.json["copied_files"])
        self.assertEqual({"f": ["b1"]}, self.other.copies_on_disk("docs-s"))
        for host in ("silent", "babbler"):
            self.assertIn(host, result.stderr)
        self.silent.setblocking(False)      # it is waited for once, not at each step of the pass
        self.silent.accept()[0].close()
        with self.assertRaises(BlockingIOError):
            self.silent.accept()


class StrangersTest(ChannelCase):
    """Who does not hold this cluster's key gets nothing, and costs nobody anything."""

    def test_plain_text_and_noise_are_cut_off(self):
        for noise in (b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b'{"op": "status"}\n', b"\x00" * 100000,
                      os.urandom(100000), b"\x16\x03\x01\xff\xff" + b"\x01" * 70000):
            with self.subTest(noise[:20]), self.connect() as peer:
                with contextlib.suppress(OSError):
                    peer.sendall(noise)
                self.assertNotIn(b"{", answer_until_cut_off(peer))
        self.assertServes()

    def test_peers_that_go_away_at_once_are_nothing_special(self):
        for _ in range(200):
            with self.connect() as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")     # reset, not end
        self.assertServes()

    def test_an_old_tls_is_refused(self):
        for version in ("TLSv1", "TLSv1_1"):
            context = tls_context(self.pem)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
            with self.subTest(version), self.connect() as plain, self.assertRaises(OSError):
                context.wrap_socket(plain).recv(1)

    def test_the_port_is_open_for_the_right_key_only(self):
        requests = self.requests_of_a_pass()
        other = os.path.join(self.directory(), "cluster.pem")
        write_file(other, new_cluster_pem())
        peers = {"no key": tls_context(self.pem, prove=False), "the key of another cluster": tls_context(other)}
        for who, context in peers.items():
            for lines in requests:
                with self.subTest(who, request=lines[0]):
                    answer = b""
                    with contextlib.suppress(OSError), self.connect() as plain:
                        with context.wrap_socket(plain) as stream:
                            with contextlib.suppress(OSError):
                                stream.sendall(b"".join(lines))
                            answer = answer_until_cut_off(stream)
                    # One word of refusal is right; what a member is told is not.
                    self.assertLessEqual(answer.count(b"\n"), 2, answer[:1000])
                    self.assertLess(len(answer), 1000, answer[:1000])
                    for secret in (b"docs", b"big", self.path.encode()):
                        self.assertNotIn(secret, answer)
        # The same requests with the right key: it is the key that makes the difference.
        answers = b""
        for lines in requests:
            with self.member() as stream:
                for line in lines[:5]:
                    stream.sendall(line)
                    answers += line_of(stream)
        self.assertIn(b"docs", answers)
        self.assertServes()

    def test_a_client_with_another_clusters_key_is_told_so_in_words(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("b1", "a", "1M")
        cluster.start("s")
        write_file(os.path.join(cluster.home("a"), "cluster.pem"), new_cluster_pem())
        cluster.start("a")
        result = cluster.client("a")
        self.assertRc(1, result)
        self.assertEqual(["s"], result.json["unreachable"])
        self.assertEqual(1, result.stderr.count("cluster.pem"), result)     # besides, that nothing is known of docs
        self.assertEqual({"f": []}, cluster.copies_on_disk("docs"))

    def requests_of_a_pass(self):
        """What the client of a says to the server of s during a pass with something to do: lines by connection."""
        write_file(os.path.join(self.path, "for the tap"), os.urandom(8))
        with listening() as (port, listener):
            tap = Tap(self.pem, self.port, listener)
            home = os.path.join(self.c.home("a"), "cbackup.conf")
            text = self.c.config()
            write_file(home, text.replace("s = 127.0.0.1:%d\n" % self.port, "s = 127.0.0.1:%d\n" % port))
            try:
                self.assertRc(0, self.c.client("a"))
            finally:
                write_file(home, text)
        requests = [lines for lines in tap.requests if lines]
        self.assertTrue(requests, "the client said nothing")
        return requests


class MembersTest(ChannelCase):
    """A member that speaks nonsense is refused or cut off: the server goes on, for it and for all others."""

    requests_of_a_pass = StrangersTest.requests_of_a_pass

    def refused(self, message):
        """Sends one message as a member; what comes back must be nothing, or a refusal, in time."""
        with self.member() as stream:
            with contextlib.suppress(OSError):
                stream.sendall(message)
            answer = b""
            with contextlib.suppress(OSError):
                answer = line_of(stream, CUT_OFF)
        if answer:
            told = json.loads(answer.decode())
            self.assertEqual({"error", "text"}, set(told), told)
            self.assertTrue(told["text"])
        self.assertTrue(self.c.servers["s"].running, "the server is gone after %r" % message[:200])
        return answer

    def test_a_member_that_says_nothing_holds_up_nobody(self):
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(self.member())
            self.assertServes()

    def test_a_member_that_drips_bytes_holds_up_nobody(self):
        with self.member() as stream:
            for byte in b'{"op"':
                stream.sendall(bytes([byte]))
                time.sleep(0.02)
            self.assertServes()

    def test_a_line_without_an_end_is_cut_off_before_it_fills_the_memory(self):
        limit, sent = 256 << 20, 0
        with self.member() as stream:
            stream.settimeout(CUT_OFF * PATIENCE)
            with contextlib.suppress(OSError):
                while sent < limit:
                    stream.sendall(b"x" * (1 << 20))
                    sent += 1 << 20
            self.assertLess(sent, limit, "the server took it all")
        self.assertServes()

    def test_what_is_no_json_object_is_refused(self):
        for message in (b"\n", b"hello\n", b"null\n", b"[]\n", b"1\n", b'"op"\n', b"{\n", b"{}\n", b"\xff\xfe\n",
                        b'{"op": "\xff"}\n', b'{"op": NaN}\n', b'{"op": 1e999}\n', b"[" * 100000 + b"\n",
                        b'{"op":' * 50000 + b"1" + b"}" * 50000 + b"\n", b'{"op": %s}\n' % (b"9" * 10000),
                        b'{"op": "\\ud800"}\n', b'{"op": "status", "op": {}}\n', b"\x00\n", b"{}" * 1000 + b"\n"):
            with self.subTest(message[:30]):
                self.refused(message)
        self.assertServes()

    def test_unknown_operations_are_refused(self):
        names = "frobnicate", "__init__", "__class__", "", "../../etc/passwd", "x" * 10000, None, 1, [], {}
        for word, name in self.todays(itertools.product(("op", "cmd", "type", "request"), names), 15):
            with self.subTest(word=word, name=str(name)[:30]):
                self.refused(json.dumps({word: name}).encode() + b"\n")
        self.assertServes()

    def test_real_requests_with_wrong_fields_do_no_harm(self):
        # Every field of every kind of request of a real pass, replaced by what it must not be.
        wrong = [None, True, -1, 2 ** 70, 1.5, 1e300, "", "x", "../../etc", "/etc/passwd", "a\x00b", "\ud800", "\udcff",
                 "y" * 100000, [], [[]], [None], ["..", "/"], {}, {"x": {}}]
        kinds = {}
        for lines in self.requests_of_a_pass():
            for line in lines:
                request = json.loads(line.decode())
                kinds.setdefault(json.dumps([sorted(request), request.get("op")]), request)
        self.assertTrue(kinds)
        tried = 0
        for request in self.todays(kinds.values(), 3):
            # Half of it may be needed to get as far as the field in question, so only one is wrong at a time.
            cases = [dict(request, **{field: value}) for field in request for value in wrong]
            cases += [{field: request[field] for field in request if field != left_out} for left_out in request]
            cases += [dict(request, surplus_field=1)]
            tried += self.send_each(cases)
        self.assertGreater(tried, 50)
        self.assertServes()
        self.assertEqual(["b1"], self.c.copies_on_disk("docs")["big"])

    def send_each(self, cases):
        """Sends messages in as few connections as the server allows; returns how many."""
        cases = [json.dumps(case).encode() + b"\n" for case in cases]
        done = 0
        while done < len(cases):
            with self.member() as stream:
                while done < len(cases):
                    done += 1
                    try:
                        stream.sendall(cases[done - 1])
                        answer = line_of(stream, CUT_OFF)
                        # After anything but an answer the connection is of no more use: the next message gets its own.
                        json.loads(answer.decode())
                    except (OSError, ValueError):
                        break
            self.assertTrue(self.c.servers["s"].running, "the server is gone after %r" % cases[done - 1][:300])
        return done

    def test_requests_and_ends_at_any_byte_are_survived(self):
        for lines in self.requests_of_a_pass():
            data = b"".join(lines[:3])
            for end in range(1, len(data), max(1, len(data) // 12)):
                with self.member() as stream:
                    stream.sendall(data[:end])
        self.assertServes()


class ClientTest(Case):
    """A server that is no server of this cluster makes a client do nothing."""

    def test_a_member_that_answers_with_nonsense_does_not_make_a_client_do_anything(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1", "g": b"2"})
        cluster.backup("b1", "a", "1M")
        cluster.start("s", "a")
        cluster.settle()
        cluster.stop("s")
        before = cluster.kept_inodes("b1")
        for answer in self.todays((b"{}\n", b"[]\n", b"null\n", b'{"ok": true}\n', b"x" * 100000 + b"\n", b"[" * 100000 + b"\n",
                                   b'{"error": 1}\n', b"\xff\n"), 4):
            with self.subTest(answer[:20]), listening() as (port, listener):
                cluster.ports["s"] = port
                pem = os.path.join(cluster.home("a"), "cluster.pem")
                threading.Thread(target=self.answer, args=(listener, pem, answer), daemon=True).start()
                result = cluster.client("a", timeout=90)
                self.assertRc(1, result)
                self.assertEqual(["s"], result.json["unreachable"])
                self.assertEqual(before, cluster.kept_inodes("b1"))

    @staticmethod
    def answer(listener, pem, answer):
        """Says `answer` first, and after each line that it hears."""
        context = tls_context(pem, ssl.PROTOCOL_TLS_SERVER)
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), context.wrap_socket(plain, True) as stream:
                stream.settimeout(30)
                for _ in range(100):
                    stream.sendall(answer)
                    if not line_of(stream, 30):
                        break


if __name__ == "__main__":
    unittest.main()
