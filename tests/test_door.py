"""The door: strangers wait outside, and one odd member holds up nobody, costs little memory, and is told the truth."""

import base64
import contextlib
import json
import os
import resource
import socket
import ssl
import threading
import time
import unittest
import zlib

import cbackup
from tests.harness import PATIENCE, Case, listening, write_file
from tests.members import context

MOST = 150 << 20        # bytes of memory that a server may ever use


class DoorCase(Case):
    """A source on s, whose door is crowded, and a backup on a."""

    @classmethod
    def setUpClass(cls):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 4096, hard))
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.backup("ba", "a", "10M")
        c.start("s")
        c.settle()
        cls.address = ("127.0.0.1", c.ports["s"])
        cls.pem = os.path.join(c.home("a"), "cluster.pem")
        cls.count = 0

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)

    def connect(self, source=None):
        return self.stack.enter_context(socket.create_connection(
            self.address, 10 * PATIENCE, source_address=(source, 0) if source else None))

    def member(self):
        channel = cbackup.Channel(context(self.pem).wrap_socket(self.connect()))
        self.stack.callback(channel.close)
        self.assertEqual("s", channel.receive(10 * PATIENCE)["host"])
        return channel

    def assertServes(self):
        """An honest pass goes well, and copies what is new."""
        type(self).count += 1
        write_file(os.path.join(self.c.sources["docs"].path, "new%d" % self.count), b"new %d" % self.count)
        result = self.c.client("a")
        self.assertRc(0, result)
        self.assertEqual(1, result.json["copied_files"])
        self.assertNotIn("Traceback", self.c.servers["s"].stderr)

    def assertSmall(self):
        """The most memory that the server ever had is within the limit."""
        path = "/proc/%d/status" % self.c.servers["s"].pid
        if not os.path.exists(path):
            return
        with open(path) as stream:
            most = next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM"))
        self.assertLess(most, MOST)


class CrowdTest(DoorCase):
    def test_honest_passes_succeed_beside_500_silent_connections(self):
        for _ in range(500):
            self.connect()
        self.assertServes()

    def test_honest_passes_succeed_beside_400_new_connections_a_second(self):
        over = threading.Event()
        made = [0]

        def crowd(hello):
            kept = []
            while not over.wait(0.005):
                with contextlib.suppress(OSError):
                    peer = socket.create_connection(self.address, 5)
                    kept.append(peer)
                    made[0] += 1
                    if hello:
                        peer.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # the head of a ClientHello
                while len(kept) > 200:
                    kept.pop(0).close()
            for peer in kept:
                peer.close()

        threads = [threading.Thread(target=crowd, args=(hello,)) for hello in (False, True)]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        try:
            for _ in range(2):
                self.assertServes()
        finally:
            rate = made[0] / (time.monotonic() - begun)
            over.set()
            for thread in threads:
                thread.join()
        self.assertGreater(rate, 40, "the crowd was none")

    def test_members_with_very_many_connections_hold_up_nobody(self):
        members = [self.member() for _ in range(cbackup.MEMBER_SHARE + 30)]
        self.assertServes()
        # The connections that were silent for the longest made room, and their owners notice.
        self.assertIsNone(members[0].receive(10 * PATIENCE))

    def test_when_the_room_is_full_the_oldest_goes_at_once(self):
        for _ in range(5):      # where the machine is too slow for it, silence alone ends it
            first, begun = self.connect(), time.monotonic()
            for _ in range(cbackup.ROOM):
                self.connect()
            first.settimeout(20 * PATIENCE)
            with contextlib.suppress(ConnectionError):
                self.assertEqual(b"", first.recv(1))
            if time.monotonic() - begun < cbackup.STRANGER_SILENCE - 0.5:
                return
        self.fail("it stayed until its time was over")

    def test_who_says_nothing_is_turned_away_soon(self):
        begun = time.monotonic()
        silent, greeting = self.connect(), self.connect()
        greeting.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        for peer in (silent, greeting):
            peer.settimeout(20 * PATIENCE)
            with contextlib.suppress(ConnectionError):
                self.assertEqual(b"", peer.recv(1))
        self.assertLess(time.monotonic() - begun, 10 * PATIENCE)


class MemoryTest(DoorCase):
    """Nothing that a peer sends makes a server large, or slow for others."""

    def test_a_stranger_who_may_join_can_say_little_and_nothing_packed(self):
        self.assertRc(0, self.c.run("s", "invite"))
        bomb = base64.b64encode(zlib.compress(b'{"op":"join","x":[' + b"[]," * 5_000_000 + b"1]}", 9))
        long = b'{"op":"join","secret":"%s"}\n' % (b"x" * 5000)
        for message in (b'{"z":"%s"}\n' % bomb, long, b"x" * 5000 + b"\n", b'{"z":"%s"}\n' % base64.b64encode(zlib.compress(b"{}"))):
            far = context(self.pem)
            far = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            far.check_hostname, far.verify_mode = False, ssl.CERT_NONE
            channel = cbackup.Channel(far.wrap_socket(self.connect()))
            self.stack.callback(channel.close)
            self.assertTrue(channel.receive(10 * PATIENCE)["join"])
            answer = None
            with contextlib.suppress(OSError):
                channel.socket.sendall(message)
                answer = channel.receive(10 * PATIENCE)
            self.assertFalse((answer or {}).get("ok"))
            self.assertTrue(answer is None or len(message) < 4096, "who says too much is not answered")
        self.assertServes()
        self.assertSmall()

    def test_a_members_messages_are_bounded_before_they_are_parsed(self):
        emoji = b'"' + b"a" * 60000 + rb"\ud83d\ude00" + b'",'
        bodies = [b'{"op":"status","x":[' + b"[]," * 2_000_000 + b"1]}", b'{"op":"x","x":' + b"[" * 10000 + b"]" * 10000 + b"}",
                  b'{"op":' + b"9" * 4_000_000 + b"}", b'{"op":"status","x":[' + emoji * 130 + b"1]}",
                  b'{"op":"status","x":[' + emoji * 400 + b"1]}", b'{"op":"' + rb"\n" * 3_900_000 + b'"}',
                  b'{"op":"status","x":"' + b'\\"' * 3_000_000, b'{"op":"status","x":[' + b'"",' * 2_000_000 + b"1]}",
                  b"x" * (40 << 20), b'{"op":"status","x":' + b"{" * 3_000_000]
        messages = [b'{"z":"%s"}\n' % base64.b64encode(zlib.compress(body, 1)) for body in bodies]
        messages += [body + b"\n" for body in bodies if len(body) < cbackup.MESSAGE_LIMIT]
        answers = []

        def send(message):
            with contextlib.suppress(OSError, cbackup.ProtocolError):
                channel = self.member()
                channel.socket.settimeout(60 * PATIENCE)
                channel.socket.sendall(message)
                answers.append(channel.receive(60 * PATIENCE))

        threads = [threading.Thread(target=send, args=(message,)) for message in messages * 2]
        for thread in threads:
            thread.start()
        self.assertServes()
        for thread in threads:
            thread.join()
        self.assertGreater(len(answers), len(threads) // 2)
        self.assertServes()
        self.assertSmall()

    def test_what_is_refused_before_it_is_parsed(self):
        deep = cbackup.NESTING
        for good in (b'{"a":[1,"[[[[[[[[[[[[[[[[[[[[",-2.5e3]}', b"[" * deep + b"]" * deep, b'{"a\\\\":"\\\\\\",[["}', b"1"):
            cbackup.check_json(good)
        for bad in (b"[" * (deep + 1) + b"]" * (deep + 1), b"[" + b"1," * cbackup.ELEMENTS + b"1]", b'{"a":' + b"1" * 40 + b"}",
                    b'"\\\\"' + b"[" * 100, b"[]]", b"}"):
            with self.assertRaises(cbackup.ProtocolError):
                cbackup.check_json(bad)


class ReasonTest(DoorCase):
    """What a user reads is the true reason."""

    def reason(self, serve):
        with listening() as (port, listener):
            def accept():
                with contextlib.suppress(OSError):
                    while True:
                        serve(listener.accept()[0])
            threading.Thread(target=accept, daemon=True).start()
            config = cbackup.parse_config(self.c.config().replace("s = 127.0.0.1:%d" % self.c.ports["s"],
                                                                  "s = 127.0.0.1:%d" % port))
            link = cbackup.Link("s", config, cbackup.Dialer(cbackup.Home(self.c.home("a"))))
            with self.assertRaises(cbackup.Unreachable) as caught:
                link.call("status")
            return str(caught.exception)

    def test_a_connection_that_is_cut_is_not_a_wrong_key(self):
        text = self.reason(lambda stream: stream.close())
        self.assertIn("cut", text)
        self.assertNotIn("cluster.pem", text)

    def test_something_else_that_listens_there_is_not_a_wrong_key(self):
        def serve(stream):
            stream.sendall(b"220 mail.example.org ESMTP\r\n")
        text = self.reason(serve)
        self.assertIn("no cbackup server", text)
        self.assertNotIn("cluster.pem", text)

    def test_a_server_that_is_busy_is_said_to_be(self):
        def serve(stream):
            with context(self.pem, ssl.PROTOCOL_TLS_SERVER).wrap_socket(stream, True) as tls:
                tls.sendall(json.dumps({"error": "busy", "text": "s is busy: it has too many"}).encode() + b"\n")
        self.assertIn("s is busy", self.reason(serve))


class InvitationTest(DoorCase):
    def try_to_join(self, source, secret):
        far = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        far.check_hostname, far.verify_mode = False, ssl.CERT_NONE
        channel = cbackup.Channel(far.wrap_socket(self.connect(source)))
        self.stack.callback(channel.close)
        hello = channel.receive(10 * PATIENCE)
        if not hello.get("join"):
            return hello
        channel.send({"op": "join", "secret": secret})
        return channel.receive(10 * PATIENCE)

    def test_wrong_tries_of_one_address_do_not_spend_the_invitation_for_others(self):
        try:
            self.connect("127.0.0.9").close()
        except OSError:
            self.skipTest("this system has one loopback address")
        secret = self.c.run("s", "invite").stdout.split()[-1][32:]
        for _ in range(7):
            self.assertIn(self.try_to_join("127.0.0.9", "wrong")["error"], ("token", "key"))
        self.assertEqual("key", self.try_to_join("127.0.0.9", secret)["error"])
        self.assertTrue(self.try_to_join("127.0.0.8", secret)["ok"])
        self.assertNotIn("ok", self.try_to_join("127.0.0.7", secret))


if __name__ == "__main__":
    unittest.main()
