"""Mutated messages: `python3 -m tests.fuzz [--messages N] [--seed N] [--tls]`.

Real requests are changed field by field, or byte by byte, and sent to a real server, which has to answer each; the answers that
real passes, restores and the like hear are changed on their way, and those have to come to their end.  In between everything is
healed by honest passes, and the state has to be right then: every file has its copies, `status` says what is there, a restore
brings the source, the configuration is what it was; nothing was printed that is a traceback; the server is as large as it was.
The seed is printed: the same one tries the same again.  TLS is left out, it would be most of the cost: not so with --tls.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import socket
import stat
import sys
import time
from unittest import mock

import cbackup
from tests import plain
from tests.harness import Cluster, differences, read_file, walk, write_file
from tests.members import copy

MOST_GROWTH = 20 << 20
SIDE_BY_SIDE = 16
"""Connections on which requests are sent at the same time."""
VALUES = [None, True, False, -1, 0, 1, 2, 4096, 1 << 31, (1 << 62) - 1, 1 << 62, 1 << 70, 1.5, -0.0, 1e17, 1e300, "", "x", "f", "docs",
          "ba", "ok", "held", "..", "../../etc", "/etc/passwd", "a\x00b", "\ud800", "\udcff", "\x1b[2J", "y" * 5000, "ff", "0" * 64, [],
          [[]], [None], ["f"], [["f", 1, 2]], {}, {"x": {}}, {"docs": 1}, {"docs": {}}]

COMMANDS = [(60, "client", "--json"), (8, "status", "--json"), (4, "status", "--check"), (4, "status"), (6, "plan"),
            (4, "find", "f*"), (4, "ls", "docs"), (3, "ls", "docs", "dir", "--json"), (5, "restore", "docs", "--dry-run"),
            (1, "restore", "docs", "--force"), (1, "verify"), (1, "accept", "docs")]
"""What hears mutated answers, each with how often."""


def places(value, at=()):
    """The places of all values in a message."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, at + (key,))


def value_at(message, at):
    for key in at:
        message = message[key]
    return message


def mutated(message, dice):
    """A copy of a message with one or a few things in it changed."""
    message = copy(message)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = [at for at in places(message) if at]
        if not found:
            break
        at = dice.choice(found)
        above, key = value_at(message, at[:-1]), at[-1]
        how = dice.randrange(6)
        if how == 0 and isinstance(above, dict):
            del above[key]
        elif how == 1 and isinstance(above, dict):
            above["unknown %d" % dice.randrange(9)] = copy(dice.choice(VALUES))
        elif how == 2 and isinstance(above, list):
            above.insert(key, copy(dice.choice([above[key], dice.choice(VALUES)])))
        elif how == 3:
            above[key] = copy(value_at(message, dice.choice(found)))
        elif how == 4 and isinstance(above[key], int):
            above[key] += dice.choice((-1, 1, 1000, 1 << 40))
        else:
            above[key] = copy(dice.choice(VALUES))
    return message


def noise(line, dice):
    """A line with some of its bytes changed; still one line."""
    line = bytearray(line)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(line) + 1)
        line[at:at + dice.choice((0, 1, 1, 5))] = bytes(dice.randrange(256) for _ in range(dice.choice((0, 1, 1, 3))))
    return bytes(line).replace(b"\n", b" ")


class Listening(cbackup.Channel):
    """A client's channel; `heard` of a Fuzz is called with each request and the line of its answer, and may return another
    line, or None for the end of the connection."""

    fuzz = None
    said = None

    def send(self, message, timeout=60.0):
        self.said = message
        super().send(message, timeout)

    def _parse(self, line):
        line = self.fuzz.heard(self.said, line, super()._parse)
        if line is None:
            raise ConnectionResetError("cut")
        return super()._parse(line)


class Fuzz:
    """hear: what becomes of an answer, in `heard`: None, or a function of (request, answer) that returns the line to hear."""

    def __init__(self, seed, say=print, tls=False):
        self.dice, self.say = random.Random(seed), say
        self.sent = self.answers = self.changed = self.commands = self.heals = 0
        self.channels, self.hear = [], None
        self.contents = set()
        self.patches = contextlib.ExitStack()
        self.c = c = Cluster("s", "a", file=None if tls else plain.__file__, replicas=1, keep="1d")
        try:
            self.patch(tls)
            self.source = c.source("docs", "s", {"f": b"1", "dir/g": b"22", "big": 300000, "old": b"x"})
            self.contents |= {read_file(path) for _, path, info in walk(self.source) if stat.S_ISREG(info.st_mode)}
            c.backup("ba", "a", "50M")
            c.start("s", "a")
            self.context = cbackup.tls_context(cbackup.Home(c.home("a")), server_side=False)
            with open(os.path.join(os.path.dirname(__file__), "wire_level_1.json")) as stream:
                self.old_requests = [dict(pair["request"], op=op) for op, pairs in json.load(stream).items()
                                     for pair in pairs if op != "new_config"]
            self.heal()
        except BaseException:
            self.close()
            raise

    def patch(self, tls):
        """Commands run in this process, as those of the harness do in theirs."""
        enter = self.patches.enter_context
        enter(mock.patch.dict(os.environ, CBACKUP_TEST="1", CBACKUP_TEST_CLOCK=self.c.path("clock"),
                              CBACKUP_TEST_IDLE="5"))      # seconds that a stream without a byte is waited for
        enter(mock.patch.object(cbackup, "Channel", type("Channel", (Listening,), {"fuzz": self})))
        if not tls:
            enter(plain.taken_out())

    def close(self):
        self.hang_up()
        self.patches.close()
        self.c.close()

    def change_source(self):
        dice = self.dice
        content = bytes(dice.randrange(256) for _ in range(dice.randrange(60))) * dice.randrange(1, 60)
        self.contents.add(content)
        write_file(os.path.join(self.source, "file %d" % dice.randrange(20)), content)
        moved = os.path.join(self.source, "file %d" % dice.randrange(20))
        with contextlib.suppress(OSError):
            os.rename(os.path.join(self.source, "file %d" % dice.randrange(20)), moved)

    # -- requests --

    def hang_up(self):
        for channel in filter(None, self.channels):
            channel.close()
        self.channels = [None] * SIDE_BY_SIDE

    def send(self, number, line):
        """Send one line on one of the connections, which is a new one when the server ended the last."""
        fresh = self.channels[number] is None
        if fresh:
            connection = self.context.wrap_socket(socket.create_connection(("127.0.0.1", self.c.ports["s"]), 30))
            self.channels[number] = Listening.__base__(connection)
        channel = self.channels[number]
        channel.socket.settimeout(60)
        channel.socket.sendall(line + b"\n")
        self.sent += 1
        return fresh

    def answer(self, number, line, fresh):
        channel = self.channels[number]
        try:
            if fresh:
                assert channel.receive(120), "no hello"
            answer = channel.receive(120)
        except (OSError, cbackup.ProtocolError) as error:
            raise AssertionError("not answered (%s): %r" % (error, line[:2000]))
        assert isinstance(answer, dict) and ("ok" in answer or isinstance(answer.get("error"), str)), (line[:2000], answer)
        if answer.get("error") == "protocol" or "ok" in answer and b"rsync" in line:    # what follows is no message
            channel.close()
            self.channels[number] = None
        return answer

    def some_line(self):
        request = self.dice.choice(self.requests)
        if self.dice.random() < 0.95:  # else one that is as it was, but comes at another time
            request = mutated(request, self.dice)
        if request.get("op") in ("look", "accept") and self.dice.random() < 0.9:
            return self.some_line()  # they make the server look at its sources, which takes its time
        line = json.dumps(request).encode()
        return noise(line, self.dice) if self.dice.random() < 0.2 else line

    def some_requests(self):
        lines = [self.some_line() for _ in self.channels]
        fresh = [self.send(number, line) for number, line in enumerate(lines)]
        for number, line in enumerate(lines):
            self.answer(number, line, fresh[number])

    # -- answers --

    def heard(self, request, line, parse):
        if self.hear is None:
            return line
        return self.hear(request, parse(line))

    def run_command(self, *words):
        """Run a command in this process; returns (exit status, standard output, standard error).  A mistake is raised."""
        out, err = io.StringIO(), io.StringIO()
        logging.getLogger().handlers.clear()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cbackup.main(["--home", self.c.home("a"), *words])
        text = out.getvalue() + err.getvalue()
        assert "Traceback" not in text and "mistake in cbackup" not in text, (words, text[-3000:])
        assert all(line.isprintable() for line in text.split("\n")), (words, text)
        assert status in (0, 1, 2), (words, status, text)
        return status, out.getvalue(), err.getvalue()

    def one_command(self):
        """A command that hears some mutated answers.  What it makes of them is its business, but it comes to its end."""
        dice, words = self.dice, self.dice.choices(COMMANDS, [each[0] for each in COMMANDS])[0][1:]
        if words[0] == "client":
            self.change_source()
        often = dice.choice((0.02, 0.1, 0.5))

        def change(request, answer):
            self.answers += 1
            if dice.random() > often:
                return json.dumps(answer).encode()
            self.changed += 1
            if dice.random() < 0.05:
                return dice.choice((None, b"", noise(json.dumps(answer).encode(), dice)))
            return json.dumps(mutated(answer, dice)).encode()

        scratch = self.c.path("restored")
        if words[0] == "restore" and "--dry-run" not in words:
            words += ("--to", scratch)
        self.hear = change
        try:
            self.run_command(*words)
        finally:
            self.hear = None
        self.commands += 1
        if os.path.isdir(scratch):
            self.check_restored(scratch)

    def check_restored(self, scratch):
        """Whoever lied: what has come is what was in the source at some time."""
        for name, path, info in walk(scratch):
            if stat.S_ISREG(info.st_mode) and not name.startswith(".cbackup"):
                assert read_file(path) in self.contents, "restored with the wrong bytes: %s" % name
        shutil.rmtree(scratch)

    # -- what has to hold --

    def heal(self):
        """Honest passes; afterwards every file is where it should be.  What they said is what is changed from now on."""
        self.hang_up()
        self.c.advance(25 * 3600)  # files that were declined are offered again
        self.change_source()
        found = []

        def note(request, answer):
            if request and request["op"] != "new_config":
                found.append(request)
            return json.dumps(answer).encode()

        self.hear = note
        for _ in range(8):
            status, out, err = self.run_command("client", "--json", "--adopt", "ba")
            if status == 0 and json.loads(out.splitlines()[-1])["settled"]:
                break
        else:
            raise AssertionError("not healed: %s" % err)
        for words in (("status", "--json"), ("plan",), ("find", "f*"), ("ls", "docs"), ("restore", "docs", "--dry-run")):
            self.run_command(*words)
        self.hear = None
        line = b'{"op":"config"}'
        offer = self.answer(0, line, self.send(0, line))["config"]
        self.requests = self.old_requests + found + [{"op": "new_config", "config": offer}]
        self.heals += 1
        self.compare()

    def compare(self):
        """Everything is as it should be when nothing had happened."""
        copies = self.c.copies_on_disk("docs")
        assert all(copies.values()), {name: where for name, where in copies.items() if not where}
        status = json.loads(self.run_command("status", "--json")[1])
        docs, ba = status["sources"]["docs"], status["backups"]["ba"]
        assert (docs["state"], docs["files"], docs["underserved_files"]) == ("ok", len(copies), 0), status
        assert {count: files for count, files in docs["copies"].items() if files} == {"1": len(copies)}, status
        assert (ba["files"], ba["used"]) == (len(copies), self.c.kept_bytes("ba")), (status, self.c.kept("ba"))
        for host in ("s", "a"):
            text = read_file(os.path.join(self.c.home(host), "cbackup.conf")).decode()
            assert text == self.c.config(), text
        if self.heals % 20 == 1:
            scratch = self.c.path("restored")
            status, _, err = self.run_command("restore", "docs", "--to", scratch)
            assert status == 0 and not differences(self.source, scratch), (err, differences(self.source, scratch))
            shutil.rmtree(scratch)
        for server in self.c.servers.values():
            said = server.stderr
            assert server.running and "Traceback" not in said and "mistake" not in said and "a request failed" not in said, said[-3000:]

    def memory(self, what="VmRSS"):
        try:
            with open("/proc/%d/status" % self.c.servers["s"].pid) as stream:
                return next(int(line.split()[1]) << 10 for line in stream if line.startswith(what))
        except OSError:
            return 0

    def run(self, messages, answers_share=0.04, heal_every=5000):
        """Until so many messages, requests and answers, were sent; of them about that share of answers."""
        begun, warm, healed = time.monotonic(), None, 0
        while self.sent + self.answers < messages:
            if self.answers < answers_share * (self.sent + self.answers + 1):
                self.one_command()
            else:
                self.some_requests()
            if self.sent + self.answers - healed > heal_every:
                self.heal()
                healed = self.sent + self.answers
                warm = warm or self.memory()
                self.say("%d requests, %d answers (%d changed) to %d commands, %d s, %.1f MB" % (
                    self.sent, self.answers, self.changed, self.commands, time.monotonic() - begun, self.memory() / (1 << 20)))
        self.heal()
        if warm:
            grown = self.memory() - warm
            self.say("the server has %.1f MB, %+.1f since the first %d messages; at most it had %.1f MB" % (
                self.memory() / (1 << 20), grown / (1 << 20), heal_every, self.memory("VmHWM") / (1 << 20)))
            assert grown < MOST_GROWTH, "the server grew by %d bytes" % grown


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.fuzz", description=__doc__.split("\n\n")[1])
    parser.add_argument("--messages", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--tls", action="store_true", help="with TLS, which takes several times as long")
    args = parser.parse_args()
    print("seed %d" % args.seed, flush=True)
    fuzz = Fuzz(args.seed, lambda line: print(line, flush=True), args.tls)
    try:
        fuzz.run(args.messages)
    finally:
        fuzz.close()
    fuzz.c.remove()
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
