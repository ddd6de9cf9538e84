"""Members that lie: whatever is said on the channel, only what is true counts, and nothing is deleted for a lie."""

import contextlib
import os
import sqlite3
import threading
import time
import unittest
from unittest import mock

import cbackup
from tests.harness import Case, some_bytes, wait_for, write_file
from tests.members import Member, digest_of, serving

LARGE = 5 << 18      # more than is compared in full, and as far as the second sample


class MemberCase(Case):
    """The source docs on s, the backups ba, bb, bc on hosts of their own and bs on s itself; N is 2; only s has a server."""

    FILES = {"f%d" % n: 100 for n in range(40)}

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", "c", replicas=2)
        cls.root = c.source("docs", "s", cls.FILES)
        for host in "abcs":
            c.backup("b" + host, host, "1G")
        c.start("s")
        wait_for(lambda: cls.source_facts()["last_scan"] is not None, 30, "no first look")

    @classmethod
    def source_facts(cls):
        with Member(cls.c, "ba", "docs") as member:
            return member.ask("status")["sources"]["docs"]

    def member(self, host):
        one = Member(self.c, "b" + host, "docs")
        self.addCleanup(one.channel.close)
        one.begin(identity=host.encode().hex() * 8)
        return one

    def copies(self):
        return {count: files for count, files in self.source_facts()["copies"].items() if files}


class CountingTest(MemberCase):
    """What counts as a copy."""

    FILES = dict({"f%d" % n: 100 for n in range(4)}, **{"large%d" % n: LARGE for n in range(3)})

    def test_the_sources_own_host_never_counts(self):
        s, a, b = map(self.member, "sab")
        a.hold("f0")
        b.hold("f0")
        before = self.copies()
        s.hold("f0")        # it asks for this one by its name
        version = a_version(self, "f0")
        s.confirm("f0", version, some_bytes(100, "f0"))
        s.placed("f0", version)
        self.assertEqual(before, self.copies())
        self.assertEqual([], a.drop("f0"), "a copy on the source's own host was counted")

    def test_what_was_not_confirmed_does_not_count(self):
        a = self.member("a")
        before = self.copies()
        version = a.claim("f1")["f1"]
        self.assertEqual([], a.placed("f1", version))
        self.assertEqual("bad", a.confirm("f1", version, b"x" * 100))
        self.assertEqual([], a.placed("f1", version))
        self.assertEqual(before, self.copies())

    def test_what_was_confirmed_of_another_version_does_not_count(self):
        a = self.member("a")
        version = a.claim("f2")["f2"]
        self.assertEqual("changed", a.confirm("f2", version + 1, some_bytes(100, "f2")))
        self.assertEqual("ok", a.confirm("f2", version, some_bytes(100, "f2")))
        self.assertEqual([], a.placed("f2", version + 1))
        self.assertEqual(["f2"], a.placed("f2", version))

    def test_another_directory_in_a_backups_place_is_refused_unless_it_is_adopted(self):
        self.member("a").hold("f3")
        other = Member(self.c, "ba", "docs")
        self.addCleanup(other.channel.close)
        self.assertEqual("identity", other.begin(identity="ee" * 8).get("error"))
        self.assertTrue(other.begin(identity="61" * 8).get("ok"))

    def test_the_samples_of_a_large_file_are_compared(self):
        a = self.member("a")
        data, wrong = some_bytes(LARGE, "large0"), bytearray(some_bytes(LARGE, "large0"))
        wrong[5] ^= 1
        version = a.claim("large0")["large0"]
        before = self.copies()
        for lie in (dict(data=bytes(wrong)),                            # an honest client with a wrong copy
                    dict(data=bytes(wrong), digest=digest_of(data))):   # it has the digest from somewhere
            self.assertNotEqual("ok", a.confirm("large0", version, **lie))
            self.assertEqual([], a.placed("large0", version))
        self.assertEqual(before, self.copies())
        self.assertEqual("ok", a.confirm("large0", version, data))

    def test_a_disputed_digest_is_settled_by_reading_whoever_came_first(self):
        a, b = self.member("a"), self.member("b")
        for name, liar, honest in (("large1", a, b), ("large2", b, a)):
            data = some_bytes(LARGE, name)
            version = liar.claim(name)[name]
            honest.claim(name)
            # Its samples are right: what is wrong in its copy lies between them.
            self.assertIn(liar.confirm(name, version, data, digest=b"\1" * 32), ("ok", "bad", "unproven"))
            liar.placed(name, version)
            wait_for(lambda: honest.confirm(name, version, data) == "ok", 30, "the true copy is not taken")
            self.assertEqual([name], honest.placed(name, version))
            self.assertEqual("bad", liar.confirm(name, version, data, digest=b"\1" * 32))
            self.assertEqual([], liar.placed(name, version), "a copy that is not true counts")
            self.assertEqual([], honest.drop(name))


def a_version(case, path):
    """The version of a file in the books of s."""
    uri = "file:%s/state/books.db?mode=ro" % case.c.home("s")
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return db.execute("SELECT version FROM entries WHERE path=?", (os.fsencode(path),)).fetchone()[0]


class DroppingTest(MemberCase):
    """A grant leaves N copies on N other hosts, whoever asks, and however often."""

    def proven(self, *names):
        wait_for(lambda: self.source_facts()["unproven_files"] == 0, 30, "not proven")
        return list(names)

    def test_a_drop_is_granted_only_when_n_others_remain(self):
        a, b, c = map(self.member, "abc")
        self.assertEqual(["f10"], a.hold("f10"))
        self.assertEqual(["f10"], b.hold("f10"))
        self.proven()
        for one in (a, b, c):
            self.assertEqual([], one.drop("f10"), "with N copies none may go")
        self.third(c, "f10")
        self.assertEqual(["f10"], a.drop("f10"))
        for one in (a, b, c, a):
            self.assertEqual([], one.drop("f10"), "granted twice")

    def third(self, member, *paths):
        """One copy more than N, as after `replicas` was lowered: what a claim does not give is simply said."""
        for path in paths:
            version = a_version(self, path)
            self.assertEqual("ok", member.confirm(path, version, some_bytes(100, path)))
            self.assertEqual([path], member.placed(path, version))

    def test_a_claim_is_no_copy_that_remains(self):
        a, b, c = map(self.member, "abc")
        a.hold("f11")
        self.assertIn("f11", b.claim("f11"))
        version = a_version(self, "f11")
        self.assertEqual("ok", c.confirm("f11", version, some_bytes(100, "f11")))
        self.assertEqual(["f11"], c.placed("f11", version))
        self.proven()
        self.assertEqual([], a.drop("f11"))
        self.assertEqual([], c.drop("f11"))

    def test_of_two_that_ask_at_once_one_is_granted_it(self):
        names = ["f%d" % n for n in range(20, 40)]
        members = a, b, c = list(map(self.member, "abc"))
        a.hold(*names)
        b.hold(*names)
        self.third(c, *names)
        self.proven()
        granted = [[], [], []]

        def ask(number):
            for name in names:
                granted[number] += members[number].drop(name)
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(names), sorted(sum(granted, [])), "each exactly once")


class FieldsTest(MemberCase):
    """Each field of each request is checked: what has the wrong type or range is refused, and changes nothing."""

    RIGHT = {
        "begin": dict(identity="61" * 8, adopt=False, capacity=1 << 30, free=1, used=0, files=0, sums={}),
        "told": dict(capacity=1, free=1, want=1, used=1, files=1, rows=[["docs", "f0"]]),
        "demand": dict(capacity=1, free=1, beyond=True),
        "todo": dict(kind=1, after=0), "done": dict(kind=1, rows=[[1, None]]), "forget": dict(paths=["f0"]),
        "report": dict(serial=1, rows=[["f0", 1, 1, 1]]), "report_end": dict(serial=1),
        "claim": dict(free=1, most_files=1, most_bytes=1), "claim_paths": dict(free=1, paths=["f0"], relieved=None),
        "release": dict(paths=["f0"], all=False), "confirm": dict(rows=[["f0", 1, "00" * 32, [0], "00" * 32]]),
        "placed": dict(rows=[["f0", 1, 1]]), "decline": dict(rows=[["f0", 1, "why"]]),
        "smallest": dict(above=0, most=1), "droppable": dict(need=1), "drop": dict(paths=["f0"]),
        "relief": dict(relieved="bb", gap=1, most=1), "standing": {}, "claims": {}, "report_start": {}, "caught_up": {},
        "catalog": dict(since=0, upto=0, cursor=[0, 0], after=0), "vaults": {}, "generations": {},
        "holdings": dict(after="", kind=1, prefix=""), "list": dict(path="", after="", kind=1),
        "held_files": dict(after=""), "accept": {}, "find": dict(pattern="x"), "forget_source": {},
        "new_config": dict(config={"version": 1, "stamp": 1, "sha256": "", "text": "", "history": []}),
        "rsync": dict(of="source", name="docs", source="docs")}

    NEVER = ({"x": [None]}, 1 << 70, [[[None]]], -1.5)
    PATHS = ("", "/etc/passwd", "../f0", "a/../f0", "a//b", "./f0", "a\0b", "\ud800", None, 1)
    NAMES = ("", "../x", "a/b", ".x", "x" * 1000, None, 5)
    COUNTS = (-1, 1 << 62, 1.5, "1", None, True)
    WRONG = {"backup": NAMES, "source": NAMES, "relieved": NAMES[:5] + (5,), "identity": ("", "xyz", "A" * 8, "0" * 65, None, 1),
             "adopt": (0, 1, None, "true"), "all": (0, 1, None, "true"), "beyond": (0, 1, "true"), "capacity": COUNTS[:4],
             "used": COUNTS[:4], "files": COUNTS[:4], "want": COUNTS[:4], "free": (1 << 62, 1.5, "1", True),
             "most_files": COUNTS, "most_bytes": COUNTS, "above": COUNTS, "most": COUNTS, "need": COUNTS, "gap": COUNTS,
             "serial": COUNTS, "since": COUNTS, "upto": COUNTS, "kind": (0, 3, 16, -1, "1", True), "pattern": ("", None, 1),
             "cursor": ([], [0], [0, 0, 0], [0, None], ["0", 0]), "of": ("", "home", 1, None), "name": NAMES,
             "paths": tuple([path] for path in PATHS) + (["f0"] * 4001,)}
    ROWS = {"told": [("docs", "f0")], "done": [(1, None)], "report": [("f0", 1, 1, 1)], "placed": [("f0", 1, 1)],
            "confirm": [("f0", 1, "00" * 32, [0], "00" * 32)], "decline": [("f0", 1, "why")]}
    CELLS = {str: PATHS, int: (1 << 62, 1.5, "1", True), list: ([-1], [None], [0] * 65, None)}

    def wrong_rows(self, op):
        """Rows with one cell that is wrong, one too few, one too many."""
        right = self.RIGHT[op]["rows"][0]
        yield [right[:-1]]
        yield [right + [1]]
        yield [right] * 4001
        for at, cell in enumerate(right):
            for value in self.CELLS.get(type(cell), ()):
                if isinstance(cell, str) and at:     # a digest, or words
                    value = {"": "0", "\ud800": "zz"}.get(value, [value]) if op == "confirm" else [value]
                yield [right[:at] + [value] + right[at + 1:]]

    def state(self):
        """All that the books of s say, but for when whom it heard."""
        uri = "file:%s/state/books.db?mode=ro" % self.c.home("s")
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            return {table: db.execute("SELECT * FROM %s" % table).fetchall() for table, in db.execute(
                "SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite%'").fetchall() if table != "meta"}

    def test_every_operation_is_tried_here(self):
        plain = {op for op, one in cbackup.OPERATIONS.items() if not one.request}
        self.assertEqual(set(cbackup.OPERATIONS), plain | set(self.RIGHT))

    def test_a_wrong_field_is_refused_and_changes_nothing(self):
        self.member("a").hold("f0")
        wait_for(lambda: self.source_facts()["unproven_files"] == 0, 30, "not proven")
        before, self.open = self.state(), None
        for op in self.todays(self.RIGHT, 5):
            right = self.RIGHT[op]
            for field in cbackup.OPERATIONS[op].request:
                values = list(self.wrong_rows(op)) if field == "rows" else list(self.WRONG.get(field, ()))
                values += [value for value in self.NEVER if (field, value) != ("sums", {"x": [None]})]
                for value in values:
                    self.assertRefused(op, dict(right, **{field: value}), field, value)
            self.assertEqual(before, self.state(), "a wrong %s changed the books" % op)

    def assertRefused(self, op, fields, field, value):
        if self.open is None:
            self.open = Member(self.c, "ba", "docs")
        answer = self.open.ask(op, **fields)
        if answer is None or answer.get("error") == "protocol":
            self.open.channel.close()
            self.open = None
        if answer is not None:
            self.assertIsInstance(answer.get("error"), str, "%s with %s=%r: %r" % (op, field, str(value)[:60], answer))
            self.assertIsInstance(answer.get("text"), str)
        self.assertTrue(self.c.servers["s"].running)


class HelloTest(Case):
    """A client asks nothing of a server that speaks another protocol, or is another machine."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.source("others", "b")
        c.backup("ba", "a", "10M")
        c.start("b")
        cls.count = 0

    def assertOnlySIsOut(self, server, *words):
        type(self).count += 1
        new = "g%d" % self.count
        write_file(os.path.join(self.c.sources["others"].path, new), b"1")
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertEqual([], server.asked)
        self.assertIn("s", result.json["unreachable"])
        self.assertNotIn("b", result.json["unreachable"])
        self.assertEqual(["ba"], self.c.copies_on_disk("others")[new])
        told = self.c.run("a", "status")
        self.assertRc(1, told)
        self.assertRc(1, self.c.run("a", "status", "--check"))
        for word in words:
            self.assertIn(word, result.stderr + told.text)

    def test_another_version_of_the_protocol(self):
        for version in (cbackup.PROTOCOL + 1, cbackup.PROTOCOL - 1, None):
            with self.subTest(version=version), serving(self.c, "s", cbackup=version) as server:
                self.assertOnlySIsOut(server, "another version of the protocol")

    def test_the_name_of_another_machine(self):
        with serving(self.c, "s", name="b") as server:
            self.assertOnlySIsOut(server, "correct its line in [hosts]")


class LimitsTest(Case):
    """A member may be silent for some time, and has some connections, not any number."""

    @contextlib.contextmanager
    def server(self, **limits):
        """A server in this process, with other limits."""
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.backup("ba", "a", "10M")
        c.write_config()
        home = cbackup.Home(c.home("s"))
        with mock.patch.multiple(cbackup, **limits):
            server = cbackup.Server(home, home.config(), "s")
            thread = threading.Thread(target=server.run, args=(lambda: None,))
            thread.start()
            try:
                yield c
            finally:
                server.stop()
                thread.join(30)

    def test_who_asks_nothing_for_long_is_cut_off_and_who_asks_is_not(self):
        with self.server(REQUEST_IDLE=1.5) as c, Member(c, "ba", "docs") as silent, Member(c, "ba", "docs") as busy:
            ended = time.monotonic() + 4
            while time.monotonic() < ended:
                self.assertTrue(busy.ask("status")["ok"])
                time.sleep(0.2)
            silent.channel.socket.settimeout(1)
            self.assertEqual(b"", self.rest_of(silent))

    @staticmethod
    def rest_of(member):
        """What still comes; b"" when the other side has hung up."""
        try:
            while True:
                data = member.channel.socket.recv(4096)
                if not data or b"silent" not in data:
                    return b"" if not data or b"error" in data else data
        except ConnectionError:
            return b""

    def test_a_host_has_so_many_connections_and_the_idlest_goes(self):
        with self.server(MEMBER_SHARE=3) as c, contextlib.ExitStack() as stack:
            members = []
            for _ in range(3):
                members.append(stack.enter_context(Member(c, "ba", "docs")))
                self.assertTrue(members[-1].ask("status")["ok"])
            self.assertTrue(members[0].ask("status")["ok"])         # the second is the idlest now
            one_more = stack.enter_context(Member(c, "ba", "docs"))
            self.assertTrue(one_more.ask("status")["ok"])
            self.assertEqual([True, False, True], [bool((one.ask("status") or {}).get("ok")) for one in members])


if __name__ == "__main__":
    unittest.main()
