"""Mutated messages: `python3 -m tests.fuzz [--messages N] [--seed N]`.

Real requests are changed field by field, or byte by byte, and sent to a real server, which has to answer each; real answers
are changed on their way to a real pass, which has to come to its end.  In between everything is healed by honest passes,
and at the end the state has to be right: every file has its copies, nothing was printed that is a traceback, the server
is as large as it was.  The seed is printed: the same one tries the same again.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import sys
import time

import cbackup
from tests.harness import Cluster, write_file
from tests.liar import between, context, copy, one_pass

MOST_GROWTH = 20 << 20
VALUES = [None, True, False, -1, 0, 1, 2, 4096, 1 << 31, (1 << 62) - 1, 1 << 62, 1 << 70, 1.5, -0.0, 1e17, 1e300, "", "x", "f", "docs",
          "ba", "ok", "held", "..", "../../etc", "/etc/passwd", "a\x00b", "\ud800", "\udcff", "\x1b[2J", "y" * 5000, "ff", "0" * 64, [],
          [[]], [None], ["f"], [["f", 1, 2]], {}, {"x": {}}, {"docs": 1}, {"docs": {}}]


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
            above["unknown %d" % dice.randrange(9)] = dice.choice(VALUES)
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


class Fuzz:
    def __init__(self, seed, say=print):
        self.dice, self.say = random.Random(seed), say
        self.sent = self.answers = self.passes = 0
        self.channel = None
        self.c = c = Cluster("s", "a", replicas=1)
        try:
            self.source = c.source("docs", "s", {"f": b"1", "dir/g": b"22", "big": 300000, "old": b"x"})
            c.backup("ba", "a", "50M")
            c.start("s", "a")
            c.settle()
            self.pem = os.path.join(c.home("a"), "cluster.pem")
            self.requests = self.listen()
        except BaseException:
            c.close()
            raise

    def close(self):
        self.hang_up()
        self.c.close()

    def listen(self):
        """Real requests of all kinds: of a pass with something to do, and of the version before."""
        found = []
        self.change_source()
        with between(self.c, "a", "s", change=lambda request, answer: found.append(request) or answer) as liar:
            one_pass(self.c, "a", liar.config)
        with open(os.path.join(os.path.dirname(__file__), "wire_level_1.json")) as stream:
            for op, pairs in json.load(stream).items():
                found += [dict(pair["request"], op=op) for pair in pairs]
        offer = self.ask(b'{"op":"config"}')["config"]  # another text would be another cluster
        return [dict(request, config=offer) if request["op"] == "new_config" else request
                for request in found if request["op"] != "rsync"]

    def change_source(self):
        dice = self.dice
        name = "file %d" % dice.randrange(20)
        write_file(os.path.join(self.source, name), os.urandom(dice.randrange(5000)))
        moved = os.path.join(self.source, "file %d" % dice.randrange(20))
        with contextlib.suppress(OSError):
            os.rename(os.path.join(self.source, "file %d" % dice.randrange(20)), moved)

    # -- requests --

    def hang_up(self):
        if self.channel:
            self.channel.close()
        self.channel = None

    def ask(self, line):
        """Send one line, and return the answer; the connection is a new one when the server ended the last."""
        if self.channel is None:
            plain = socket.create_connection(("127.0.0.1", self.c.ports["s"]), 30)
            self.channel = cbackup.Channel(context(self.pem).wrap_socket(plain))
            self.channel.receive(60)
        self.channel.socket.settimeout(60)
        self.channel.socket.sendall(line + b"\n")
        self.sent += 1
        answer = self.channel.receive(120)
        if answer is None or answer.get("error") == "protocol":
            self.hang_up()
        return answer

    def one_request(self):
        request = mutated(self.dice.choice(self.requests), self.dice)
        if request.get("op") in ("look", "accept") and self.dice.random() < 0.9:
            return  # they make the server look at its sources, which takes its time
        line = json.dumps(request).encode()
        if self.dice.random() < 0.2:
            line = noise(line, self.dice)
        answer = self.ask(line)
        assert isinstance(answer, dict) and ("ok" in answer or isinstance(answer.get("error"), str)), (line[:2000], answer)

    # -- answers --

    def one_pass(self):
        """A pass that hears some mutated answers.  What it makes of them is its business, but it comes to its end."""
        self.change_source()
        often = self.dice.choice((0.02, 0.1, 0.5))

        def change(request, answer):
            self.answers += 1
            if self.dice.random() > often:
                return answer
            if self.dice.random() < 0.05:
                return self.dice.choice((None, b"\n", noise(json.dumps(answer).encode(), self.dice) + b"\n"))
            return mutated(answer, self.dice)

        with between(self.c, "a", "s", change=change) as liar:
            figures = one_pass(self.c, "a", liar.config)
        self.passes += 1
        text = "".join(figures.lines)
        assert text.isprintable() and "mistake in cbackup" not in text, figures.lines

    # -- what has to hold --

    def heal(self):
        """Honest passes; afterwards every file is where it should be."""
        self.hang_up()
        self.c.advance(25 * 3600)  # files that were declined are offered again
        for _ in range(6):
            result = self.c.client("a", "--adopt", "ba")
            if result.rc == 0 and result.json["settled"]:
                break
        else:
            raise AssertionError("not healed: %s" % self.c.client("a", "--adopt", "ba", "-vv"))
        copies = self.c.copies_on_disk("docs")
        assert all(copies.values()), {name: where for name, where in copies.items() if not where}
        server = self.c.servers["s"]
        assert server.running and "Traceback" not in server.stderr and "mistake" not in server.stderr, server.stderr[-3000:]

    def memory(self):
        try:
            with open("/proc/%d/status" % self.c.servers["s"].pid) as stream:
                return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmRSS"))
        except OSError:
            return 0

    def run(self, messages, passes_share=0.02, heal_every=5000):
        warm = None
        begun = time.monotonic()
        while self.sent + self.answers < messages:
            if self.dice.random() < passes_share:
                self.one_pass()
            else:
                self.one_request()
            if self.sent + self.answers > heal_every and warm is None or (self.sent + 1) % heal_every == 0:
                self.heal()
                warm = warm or self.memory()
                self.say("%d requests, %d answers in %d passes, %d s, %d MB" % (
                    self.sent, self.answers, self.passes, time.monotonic() - begun, self.memory() >> 20))
        self.heal()
        if warm:
            assert self.memory() - warm < MOST_GROWTH, "the server grew from %d to %d bytes" % (warm, self.memory())


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.fuzz", description=__doc__.split("\n\n")[1])
    parser.add_argument("--messages", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    args = parser.parse_args()
    print("seed %d" % args.seed, flush=True)
    fuzz = Fuzz(args.seed, lambda line: print(line, flush=True))
    try:
        fuzz.run(args.messages)
    finally:
        fuzz.close()
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
