"""Sources do not hold still while they are copied: what arrived of a file that changed does not count and is taken again."""

import contextlib
import os
import signal
import sqlite3
import threading
import unittest

from tests.faults import regular_files, violations
from tests.harness import Case, Link, digest_of, make_tree, some_bytes, wait_for, write_file

SIZE = 60000


def change(path):
    """Other bytes, the same size."""
    write_file(path, some_bytes(os.path.getsize(path), path + "changed"))


def change_secretly(path):
    """Other bytes, the same size, and the time is set back: only the time of the inode's change tells."""
    info = os.stat(path)
    change(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def replace(path):
    """Another file under the same name, with the old one's size and time."""
    info = os.stat(path)
    write_file(path + ".new", some_bytes(info.st_size, path + "replaced"))
    os.utime(path + ".new", ns=(info.st_atime_ns, info.st_mtime_ns))
    os.rename(path + ".new", path)


def grow(path):
    with open(path, "ab") as file:
        file.write(some_bytes(SIZE // 2, path + "grown"))


def shrink(path):
    os.truncate(path, SIZE // 3)


def become(kind):
    def become_it(path):
        os.unlink(path)
        make_tree(os.path.dirname(path), {os.path.basename(path): kind} if isinstance(kind, Link) else
                  {os.path.basename(path) + "/below": b"in a directory"})
    return become_it


MUTATIONS = {"changed": change, "secretly": change_secretly, "replaced": replace, "grown": grow, "shrunk": shrink,
             "chmodded": lambda path: os.chmod(path, 0o751), "vanished": os.unlink, "directory": become("directory"),
             "symlink": become(Link("nowhere"))}


class WhileCopyingCase(Case):

    FILES = sorted(MUTATIONS) + ["untouched"]

    @classmethod
    def begin(cls, **options):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"stay/%02d" % number: 100 for number in range(40)}, **options)
        c.backup("b1", "a", "60M")
        c.start()
        c.settle()

    def add(self, folder, size=SIZE):
        make_tree(os.path.join(self.source, folder), {name: some_bytes(size, folder + name) for name in self.FILES})

    def mutate(self, folder):
        """Does to each file what its name says; returns the digests that its copy may have from now on."""
        allowed = {}
        for name in self.FILES:
            path = os.path.join(self.source, folder, name)
            allowed[name] = {digest_of(path)}
            if name in MUTATIONS:
                MUTATIONS[name](path)
            if os.path.isfile(path):
                allowed[name].add(digest_of(path))
        return allowed

    def assertNeverTorn(self, folder, allowed):
        """What stands at a file's place is a version that it had, and nothing else; what counts is there."""
        self.assertEqual([], violations(self.c, settled=False))
        for name in regular_files(self.c.backups["b1"].path, "docs/" + folder):
            if name in allowed:
                self.assertIn(digest_of(self.c.kept_as("b1", "docs", os.path.join(folder, name))), allowed[name], name)

    def assertTakenAgain(self):
        self.c.settle()
        self.assertEqual([], violations(self.c))


class DuringATransferTest(WhileCopyingCase):
    """Files change while rsync is at work on them or has not come to them yet."""

    @classmethod
    def setUpClass(cls):
        cls.begin(bwlimit="2M")

    def during(self, folder, first):
        """A pass during which all is mutated, when some of `first` has arrived. Returns its result and what may lie there."""
        client = self.c.spawn("a", "client", "--json")
        self.addCleanup(client.kill)

        def arriving():
            found = regular_files(self.c.backups["b1"].path, ".cbackup/incoming/docs/" + folder)
            return any(first in name and info.st_size > 100000 for name, info in found.items()) or not client.running
        wait_for(arriving, 30, "nothing arrives")
        self.assertTrue(client.running, "it was over before it could be disturbed: %s" % client.stderr)
        allowed = self.mutate(folder)
        return client, allowed

    def test_new_files_that_change_before_their_turn(self):
        self.add("new")
        make_tree(os.path.join(self.source, "new"), {"a large one": 3 << 20})
        client, allowed = self.during("new", "a large one")
        result = client.wait()
        self.assertFalse(result.json["settled"])
        self.assertEqual(0, result.json["failed_files"], "a change is no failure: %s" % result)
        self.assertNeverTorn("new", allowed)
        self.assertTrue(os.path.exists(self.c.kept_as("b1", "docs", "new/untouched")), "what did not change is copied")
        self.assertTakenAgain()

    def test_known_files_that_change_again_before_their_turn(self):
        self.add("known")
        make_tree(os.path.join(self.source, "known"), {"a large one": 3 << 20})
        self.c.settle()
        before = {name: digest_of(os.path.join(self.source, "known", name)) for name in self.FILES}
        for name in self.FILES + ["a large one"]:
            path = os.path.join(self.source, "known", name)
            write_file(path, some_bytes(os.path.getsize(path), "second " + name))
        client, allowed = self.during("known", "a large one")
        client.wait()
        for name, digest in before.items():
            allowed[name].add(digest)
        self.assertNeverTorn("known", allowed)
        self.assertTakenAgain()
        # What had been confirmed once is not lost by it.
        kept = {digest_of(os.path.join(self.c.backups["b1"].path, ".cbackup/attic/docs", name)) for name in
                regular_files(self.c.backups["b1"].path, ".cbackup/attic/docs")}
        self.assertLessEqual(set(before.values()), kept)

    def test_a_file_that_is_rewritten_while_it_is_sent(self):
        path = os.path.join(self.source, "torn")
        write_file(path, some_bytes(4 << 20, "before"))
        client = self.c.spawn("a", "client", "--json")
        self.addCleanup(client.kill)
        wait_for(lambda: any(info.st_size > 1 << 20 for info in regular_files(
            self.c.backups["b1"].path, ".cbackup/incoming").values()) or not client.running, 30, "nothing arrives")
        self.assertTrue(client.running, client.stderr)
        info = os.stat(path)
        with open(path, "r+b") as file:
            file.write(some_bytes(4 << 20, "after"))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        self.assertEqual(0, client.wait().json["copied_files"])
        self.assertFalse(os.path.exists(self.c.kept_as("b1", "docs", "torn")), "neither the old nor the new version arrived")
        self.assertEqual([], violations(self.c, settled=False))
        self.assertTakenAgain()


class BetweenTwoStepsTest(WhileCopyingCase):
    """Files change after they were copied, digested, confirmed, put into place: the pass died there, the next one goes on."""

    @classmethod
    def setUpClass(cls):
        cls.begin()

    def at(self, point, again):
        """One pass ends at `point`, then all is mutated. again: the files were known, and changed before."""
        folder = point + (" again" if again else "")
        self.add(folder)
        earlier = {}
        if again:
            self.c.settle()
            for name in self.FILES:
                path = os.path.join(self.source, folder, name)
                earlier[name] = digest_of(path)
                write_file(path, some_bytes(SIZE + 1, "second " + name))
        self.assertEqual(-signal.SIGKILL, self.c.client("a", CBACKUP_TEST_KILL=point).rc)
        allowed = self.mutate(folder)
        for name, digest in earlier.items():
            allowed[name].add(digest)
        self.assertRc(0, self.c.client("a"))
        self.assertNeverTorn(folder, allowed)
        self.assertTakenAgain()

    def test_new_files(self):
        for point in self.todays(("copied", "confirmed", "counted"), 1):
            with self.subTest(point=point):
                self.at(point, again=False)

    def test_known_files(self):
        for point in self.todays(("copied", "confirmed", "in-place"), 1):
            with self.subTest(point=point):
                self.at(point, again=True)


class LongerThanALeaseTest(Case):

    def test_a_file_that_is_on_its_way_for_hours_is_not_copied_by_another_host_too(self):
        for bwlimit in ("40K", "20K", "10K"):       # on a slow machine the hours take longer than the file
            if self.still_on_its_way_afterwards(bwlimit):
                return
        self.fail("not a test: it was over too soon")

    def still_on_its_way_afterwards(self, bwlimit):
        """Whether the file was on its way all the time."""
        c = self.cluster("s", "a", "b", replicas=1)
        c.source("docs", "s", {"large": 600000})
        c.backup("ba", "a", "9M", bwlimit=bwlimit)
        c.start()
        client = c.spawn("a", "client", "--json")
        self.addCleanup(client.kill)
        books = os.path.join(c.home("s"), "state", "books.db")

        def expires():
            with contextlib.closing(sqlite3.connect("file:%s?mode=ro" % books, uri=True)) as db:
                return db.execute("SELECT MAX(expires) FROM copies WHERE state='c'").fetchone()[0]
        wait_for(expires, 20, "nothing is claimed")
        for _ in range(3):      # twice as long as a claim holds
            before = expires()
            c.advance(2400)

            def renewed():
                return expires() != before or not client.running
            with contextlib.suppress(AssertionError):
                wait_for(renewed, 2, "")
            if not renewed():   # the server may have been told before it has seen what the clock says now
                c.advance(900)
                wait_for(renewed, 10, "the claim is not renewed")
        c.backup("bb", "b", "9M")
        c.write_config()
        copied = c.client("b").json["copied_files"]
        if not client.running:
            return False
        self.assertEqual(0, copied)
        self.assertEqual(1, client.wait().json["copied_files"])
        self.assertEqual({"large": ["ba"]}, c.copies_on_disk("docs"))
        return True


class RestlessFileTest(Case):
    """A file that changes all the time does not keep the others from being copied, nor a pass from ending."""

    def test_the_others_are_copied_and_it_is_when_it_rests(self):
        cluster = self.cluster("s", "a", "b", replicas=2)
        source = cluster.source("docs", "s", {"%02d" % number: 20000 for number in range(30)})
        make_tree(source, {"10 restless": 300000, "11 log": 100000})
        for host in "ab":
            cluster.backup("b" + host, host, "9M")
        over, turns = threading.Event(), [0]

        def write():
            while not over.wait(0.002):
                turns[0] += 1
                with open(os.path.join(source, "10 restless"), "r+b") as file:
                    file.seek(turns[0] * 1000 % 300000)
                    file.write(b"%d" % turns[0])
                with open(os.path.join(source, "11 log"), "ab") as file:
                    file.write(b"line %d\n" % turns[0])
        thread = threading.Thread(target=write)
        thread.start()
        try:
            cluster.start()
            for turn in range(4):
                before = turns[0]
                clients = [cluster.spawn(host, "client", "--json") for host in "ab"]
                for client in clients:
                    self.assertRc(0, client.wait(30))
                self.assertGreater(turns[0], before, "nobody wrote during the pass")
                there = cluster.copies_on_disk("docs")
                self.assertEqual([], [name for name, backups in there.items() if name[:3] not in ("10 ", "11 ")
                                      and len(backups) < 2], "the others, in pass %d" % turn)
                # While it is written to, every new version may need a pass of its own; the others change on the way.
                write_file(os.path.join(source, "%02d" % turn), some_bytes(20000, turn + 100))
                make_tree(source, {"new %d" % turn: 1000})
        finally:
            over.set()
            thread.join()
        cluster.settle()
        self.assertEqual([], violations(cluster))


if __name__ == "__main__":
    unittest.main()
