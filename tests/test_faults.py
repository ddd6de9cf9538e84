"""Processes die, disks fill, state is lost, lines are cut: nothing is lost, and nothing has to be repaired by hand."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest

from tests import faults, soak
from tests.faults import Proxy, fill, holders, kill_points, kill_rsyncs_of, lose_state, regular_files, tmpfs_or_skip, violations
from tests.harness import Case, Cluster, digest_of, make_tree, new_cluster_pem, some_bytes, tree, wait_for, write_file


class FaultCase(Case):

    def assertHolds(self, cluster, **options):
        self.assertEqual([], violations(cluster, **options))

    def assertRecovers(self, cluster, rounds=4):
        """Passes, however they end, come to a round in which every host is settled. Returns the figures of all passes.
        rounds: 1: of one pass each; else each has as many as have something to do."""
        figures, words = [], ["client", "--json"] + ["--until-settled"] * (rounds > 1)
        for _ in range(rounds):
            clients = [cluster.spawn(host, *words) for host in cluster.backup_hosts()]
            results = [client.wait() for client in clients]
            figures += [result.json for result in results]
            if all(result.rc == 0 and result.json["settled"] for result in results):
                self.assertHolds(cluster)
                return figures
        self.fail("not settled after %d rounds; the last one:\n%s\n%s" % (
            rounds, "\n".join(map(str, results)), "\n".join(violations(cluster))))


class KillPointsTest(FaultCase):
    """kill -9 at each of the points that the program names: the next passes put everything right."""

    SIZE = 30000
    AFTER_COPY = {"copied", "digested", "confirmed", "in-place", "counted"}

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.stay = {"stay/%02d" % number: 100 for number in range(60)}
        cls.source = c.source("docs", "s", cls.stay)
        cls.extra = c.source("extra", "s", {"f%d" % number: 5000 for number in range(10)})
        c.backup("b1", "a", "9M")
        c.backup("b2", "b", "9M")
        cls.number = 0
        cls.add()
        c.start()
        c.settle()

    @classmethod
    def add(cls):
        """The files of a round, to be changed in the next one."""
        cls.number += 1
        cls.here = os.path.join(cls.source, "round%d" % cls.number)
        make_tree(cls.here, {"%s%d" % (name, cls.number): 1000 for name in ("moved", "one", "two", "deleted")})
        make_tree(cls.here, {"large%d" % number: cls.SIZE for number in range(4)})

    def history(self):
        """One more round of all that can happen to a source; returns the digests of files that must not get lost."""
        here, number = self.here, str(self.number)
        for old, new in (("moved", "sub/moved"), ("one", "t"), ("two", "one"), ("t", "two")):
            os.makedirs(os.path.join(here, "sub"), exist_ok=True)
            os.rename(os.path.join(here, old + number), os.path.join(here, new + number))
        os.unlink(os.path.join(here, "deleted" + number))
        write_file(os.path.join(here, "large0"), some_bytes(self.SIZE, ("changed", number)))
        self.add()
        return {digest_of(os.path.join(here, name + number)) for name in ("sub/moved", "one", "two")}

    def kill_client(self, point):
        # The first batch is one of updates, the second one of new files.
        result = self.c.client("a", CBACKUP_TEST_KILL=point + (":2" if point in self.AFTER_COPY else ""))
        return result.rc == -signal.SIGKILL

    def kill_server(self, point):
        """A server that dies at the point while clients are at work."""
        self.history()
        self.c.stop("s")
        server = self.c.spawn("s", "server", CBACKUP_TEST_KILL=point)
        self.addCleanup(server.kill)
        wait_for(lambda: not server.running or "listening on" in server.stdout, 20, "the server is neither ready nor dead")
        for host in "ab":
            if server.running:
                self.c.client(host)
        dead = not server.running and server.wait().rc == -signal.SIGKILL
        server.kill()
        self.c.start("s")
        return dead

    @contextlib.contextmanager
    def overserved(self):
        """b1 is over its size, and its copies of one source are more than are wanted."""
        def change(replicas, size):
            self.c.sources["extra"] = self.c.sources["extra"]._replace(options={"replicas": replicas})
            self.c.backups["b1"] = self.c.backups["b1"]._replace(options={"size": size})
            self.c.stop("s")
            self.c.start("s")
        change(1, str(self.current_bytes() - 20000))
        try:
            yield
            self.assertRecovers(self.c)
        finally:
            change(2, "9M")

    def current_bytes(self):
        return sum(info.st_size for name in ("docs", "extra")
                   for info in regular_files(self.c.backups["b1"].path, name).values())

    def test_each_point(self):
        for point in self.todays(kill_points(), 2):
            with self.subTest(point=point):
                precious = self.history()
                if self.kill_client(point):
                    self.check_after_kill(point, precious)
                elif self.kill_drop(point) or self.kill_server(point):
                    self.assertRecovers(self.c)
                else:
                    self.fail("no test reaches the point %r" % point)

    def kill_drop(self, point):
        self.c.settle()
        with self.overserved():
            return self.kill_client(point)

    def check_after_kill(self, point, precious):
        there = holders(self.c, "docs")
        self.assertEqual([], [name for name in self.stay if len(there[name]) != 2], "untouched files are missing")
        for digest in precious:
            self.assertEqual({"a", "b"}, faults.anywhere(self.c, digest), "the bytes of a renamed file are missing")
        again = self.c.client("a")
        self.assertRc(0, again)
        if point in self.AFTER_COPY:
            self.assertLess(again.json["wire_bytes"], self.SIZE, "what had arrived was copied again")
        self.assertRecovers(self.c)


class KilledTest(FaultCase):
    """Any process dies in the middle of a large file or of many small ones."""

    BIG = 3 << 20

    def start(self, files, **options):
        cluster = self.cluster("s", "a", replicas=1)
        self.source = cluster.source("docs", "s", files, **options)
        cluster.backup("b1", "a", "50M")
        cluster.start()
        return cluster

    def arrived(self, cluster):
        """Bytes that lie in `incoming`, wherever rsync has them."""
        found = regular_files(cluster.backups["b1"].path, ".cbackup/incoming")
        return sum(info.st_size for info in found.values())

    def client_at(self, cluster, size, **more):
        """A client that is at work, and has received so many bytes."""
        client = cluster.spawn("a", "client", "--json", **more)
        self.addCleanup(client.kill)
        wait_for(lambda: self.arrived(cluster) >= size or not client.running, 30, "nothing arrives")
        self.assertTrue(client.running, "it was over before it could be disturbed: %s" % client.stderr)
        return client

    def test_a_large_file_goes_on_where_it_was_cut_off(self):
        cluster = self.start({"big": self.BIG}, bwlimit="1M")
        self.client_at(cluster, self.BIG // 4).signal(signal.SIGKILL)                     # the client dies
        second = self.client_at(cluster, self.BIG // 2)
        cluster.kill("s")                                                       # the source's machine dies
        result = second.wait(60)
        self.assertRc(1, result)
        self.assertEqual(["s"], result.json["unreachable"])
        self.assertGreaterEqual(self.arrived(cluster), self.BIG // 2)
        cluster.start("s")
        last = cluster.client("a")
        self.assertRc(0, last)
        self.assertEqual((1, self.BIG), (last.json["copied_files"], last.json["copied_bytes"]))
        self.assertLess(last.json["wire_bytes"], self.BIG * 3 // 4)
        self.assertRecovers(cluster, 1)

    def test_rsync_dies_on_either_side(self):
        cluster = self.start({"d%d/f%d" % (n, n): 100000 for n in range(20)}, bwlimit="2M")
        for side in ("client", "server"):
            client = self.client_at(cluster, 200000)
            self.assertGreater(kill_rsyncs_of(client if side == "client" else cluster.servers["s"]), 0)
            result = client.wait(60)
            self.assertRc(1, result)
            self.assertHolds(cluster, settled=False)
        self.assertRecovers(cluster, 3)

    def test_a_line_that_is_cut_or_stalls_is_given_up_and_what_came_is_kept(self):
        cluster = self.start({"d%d/f%d" % (n, n): 100000 for n in range(20)})
        proxy = Proxy(cluster.ports["s"])
        self.addCleanup(proxy.close)
        conf = os.path.join(cluster.home("a"), "cbackup.conf")
        write_file(conf, cluster.config().replace(":%d" % cluster.ports["s"], ":%d" % proxy.port))
        for fault in ("cut_after", "stall_after"):
            setattr(proxy, fault, proxy.passed + 750000)
            result = cluster.client("a", CBACKUP_TEST_IDLE="3", timeout=40)
            self.assertRc(1, result)
            self.assertEqual(["s"], result.json["unreachable"])
            self.assertHolds(cluster, settled=False)
            setattr(proxy, fault, None)
        result = cluster.client("a")
        self.assertRc(0, result)
        self.assertLess(result.json["wire_bytes"], 1250000, "what had arrived was copied again")
        self.assertRecovers(cluster, 1)


class PowerFailureTest(FaultCase):
    """The backup's machine loses its power: what was not durable yet is gone, though its name, size and time may be there."""

    NAMES = ["f%d" % number for number in range(5)]
    SIZE = 30000

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"stay/%02d" % number: 100 for number in range(20)})
        cls.kept = c.backup("b1", "a", "9M")
        c.start()
        c.settle()

    def write(self, folder, version):
        """One version of this folder's files; returns their digests."""
        top = os.path.join(self.source, folder)
        make_tree(top, {name: some_bytes(self.SIZE, (folder, name, version)) for name in self.NAMES})
        return {digest_of(os.path.join(top, name)) for name in self.NAMES}

    def fail_at(self, point, versions):
        """The power fails at a point of the pass that brings the files. versions: 1: they are new, 2: they are known."""
        folder = "%s %d" % (point.replace(":", " "), versions)
        digests = self.write(folder, 1)
        if versions == 2:
            self.c.settle()
            old, digests = digests, self.write(folder, 2)
        self.assertEqual(-signal.SIGKILL, self.c.client("a", CBACKUP_TEST_KILL=point).rc)
        torn = 0
        for name, info in regular_files(self.kept).items():
            path = os.path.join(self.kept, name)
            if digest_of(path) in digests and info.st_nlink == 1:
                torn += 1
                os.truncate(path, 0)
                os.truncate(path, info.st_size)
                os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        self.assertGreater(torn, 1, "nothing had arrived")
        self.c.client("a")
        self.assertHolds(self.c, settled=False)
        if versions == 2:
            self.assertEqual({"a"}, set.union(*[faults.anywhere(self.c, digest) for digest in old]))
            self.assertTrue(all(faults.anywhere(self.c, digest) for digest in old), "an old version is lost")
        self.assertRecovers(self.c, 3)

    def test_new_files(self):
        for point in self.todays(("copied", "digested", "confirmed"), 1):
            with self.subTest(point=point):
                self.fail_at(point, 1)

    def test_known_files(self):
        # linked:3: two of them are at their places, and not yet made durable.
        for point in self.todays(("copied", "digested", "confirmed", "linked:3"), 1):
            with self.subTest(point=point):
                self.fail_at(point, 2)


class DamageTest(FaultCase):
    """state/ or a backup's database is lost or garbage: rebuilt from what is there, and no data is copied."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", "c", replicas=2)
        cls.source = c.source("docs", "s", {"d%d/f%d" % (n % 4, n): 20000 + n for n in range(30)})
        for host in "abc":
            c.backup("b" + host, host, "450K")      # so that each has a part of the files
        c.start()
        c.settle(limit=15)
        for name in c.backups:
            c.backups[name] = c.backups[name]._replace(options={"size": "9M"})
        # something in the attics
        write_file(os.path.join(cls.source, "d0/f0"), some_bytes(20000, "new"))
        os.unlink(os.path.join(cls.source, "d1/f1"))
        c.settle()

    def books(self):
        return os.path.join(self.c.home("s"), "state", "books.db")

    def vault(self, name="ba"):
        return os.path.join(self.c.backups[name].path, ".cbackup", "backup.db")

    @staticmethod
    def garble(path, kind):
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            if kind == "whole":
                file.write(some_bytes(size, "garbage"))
            elif kind == "middle":
                file.seek(4096)
                file.write(some_bytes(max(4096, size - 8192), "garbage"))
            elif kind == "half":
                file.truncate(size // 2 // 4096 * 4096)
            elif kind == "empty":
                file.truncate(0)

    def assertNothingCopied(self, before):
        figures, hosts = [], "abc"
        for turn in range(4):
            # At first one after the other: what the later ones have is not known yet to the server.
            results = self.c.passes(hosts) if not turn else [
                client.wait() for client in [self.c.spawn(host, "client", "--json") for host in hosts]]
            figures += [result.json for result in results]
            hosts = [host for host, result in zip(hosts, results) if result.rc != 0 or not result.json["settled"]]
            if not hosts:
                break
        else:
            self.fail("not settled: %s" % "\n".join(map(str, results)))
        self.assertHolds(self.c)
        self.assertEqual((0, 0), (sum(one["wire_bytes"] for one in figures), sum(one["copied_files"] for one in figures)))
        self.assertEqual(before, self.kept())

    def kept(self):
        """The files in all backups, without times of change: a rename to itself is none."""
        return {name: {path: info[:3] for path, info in self.c.kept_inodes(name).items()} for name in self.c.backups}

    def test_a_server_without_its_state(self):
        before = self.kept()
        lose_state(self.c, "s")
        self.assertNothingCopied(before)

    def test_a_server_with_garbage_for_its_books(self):
        for kind in self.todays(("whole", "middle"), 1):
            with self.subTest(kind=kind):
                before = self.kept()
                self.c.stop("s")
                self.garble(self.books(), kind)
                self.c.start("s")
                self.assertNothingCopied(before)

    def test_a_client_without_its_state_or_with_garbage_in_it(self):
        before = self.kept()
        lose_state(self.c, "a")
        for host in "bc":
            for name in os.listdir(os.path.join(self.c.home(host), "state")):
                path = os.path.join(self.c.home(host), "state", name)
                if name.endswith(".json") and os.path.isfile(path):
                    write_file(path, b"\0garbage")
        self.assertNothingCopied(before)

    def test_backups_without_their_database_or_all_bookkeeping_but_the_identity(self):
        before = self.kept()
        os.unlink(self.vault("ba"))
        meta = os.path.dirname(self.vault("bb"))
        for name in os.listdir(meta):
            path = os.path.join(meta, name)
            if name not in ("identity", "attic"):
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        self.garble(self.vault("bc"), "empty")
        self.assertNothingCopied(before)

    def test_backups_with_garbage_for_their_databases(self):
        before = self.kept()
        for name, kind in (("ba", "whole"), ("bb", "middle"), ("bc", "half")):
            self.garble(self.vault(name), kind)
        self.assertNothingCopied(before)

    def test_old_versions_are_known_again(self):
        os.unlink(self.vault("bc"))
        kept = self.c.attic("bc", "docs")
        used = faults.room_taken(self.c, "bc")
        self.c.client("c")
        self.assertEqual(kept, self.c.attic("bc", "docs"))
        self.assertEqual(used, self.c.status()["backups"]["bc"]["used"])


class FullDiskTest(FaultCase):
    """No room left, or read-only: said, nothing lost, and it goes on by itself."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"f%d" % number: b"1" for number in range(5)})
        cls.kept = c.backup("b1", "a", "100M")
        cls.states, cls.small = [os.path.join(c.home(host), "state") for host in "sa"], None
        try:
            for path, size in [(cls.kept, "30m")] + [(path, "2m") for path in cls.states]:
                tmpfs_or_skip(cls, path, size)
        except unittest.SkipTest as reason:
            cls.small = str(reason)
        c.start()
        c.settle()

    def setUp(self):
        self.here = os.path.join(self.source, self.id().rpartition(".")[2])

    def need_small_disks(self):
        if self.small:
            self.skipTest(self.small)

    def remount(self, path, options):
        subprocess.check_call(["mount", "-o", "remount," + options, path])

    def test_a_full_disk_below_a_backup(self):
        self.need_small_disks()
        self.remount(self.kept, "size=%dk" % (1500 + self.c.kept_bytes("b1") // 1024))
        make_tree(self.here, {"f%d" % number: 100000 for number in range(20)})
        for _ in range(2):
            self.assertFalse(self.c.client("a").json["settled"])
            self.assertHolds(self.c, settled=False)
            there = holders(self.c, "docs")
            self.assertGreater(sum(len(there[name]) for name in there if name.startswith("test_a_full")), 3, "what fits is there")
        self.remount(self.kept, "size=30m")
        self.assertRecovers(self.c)

    def test_what_the_server_counted_is_said_also_when_the_disk_is_full_just_then(self):
        make_tree(self.here, {"f%d" % number: 300 for number in range(20)})
        result = self.c.client("a", CBACKUP_TEST_BEFORE="import sqlite3\ndef full(vault, source, paths, *more):\n    if paths:\n"
                               "        raise sqlite3.OperationalError('database or disk is full')\ncbackup.Vault.arrived = full\n")
        self.assertRc(1, result)
        self.assertEqual((20, 6000), (result.json["copied_files"], result.json["copied_bytes"]))
        self.assertCopies(self.c, "docs", 1)
        self.assertRecovers(self.c)

    def test_a_full_disk_stops_only_its_backup_and_is_said_in_its_own_words(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f%d" % number: 30000 for number in range(10)})
        full, state = cluster.backup("b1", "a", "9M"), os.path.join(cluster.home("a"), "state")
        for path in (full, state):
            tmpfs_or_skip(self, path, "1m")
        cluster.backup("b2", "a", "9M")
        cluster.start()
        fill(os.path.join(full, "lost+found"))
        for path in (full, state):
            if path == state:
                cluster.client("a", "--adopt", "b1")
                os.unlink(os.path.join(full, "lost+found"))
                os.unlink(os.path.join(state, "backups.json"))
                fill(os.path.join(state, "ballast"))
            result = cluster.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, path, "No space left on device")
            self.assertCopies(cluster, "docs", 1)
        os.unlink(os.path.join(state, "ballast"))
        self.assertRecovers(cluster)

    def test_a_read_only_backup(self):
        self.need_small_disks()
        self.remount(self.kept, "ro")
        self.addCleanup(self.remount, self.kept, "rw")
        write_file(os.path.join(self.source, "f0"), "22")
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "b1", "ead-only")
        self.remount(self.kept, "rw")
        self.assertRecovers(self.c)

    def test_no_room_for_state(self):
        self.need_small_disks()
        ballast = [os.path.join(path, "ballast") for path in self.states]
        for path in ballast:
            fill(path)
        make_tree(self.here, {"%d" % number: 10 for number in range(1000)})
        result = self.c.client("a")
        self.assertNotEqual((0, True), (result.rc, result.json["settled"]))
        self.assertTrue(self.c.servers["s"].running)
        self.assertHolds(self.c, settled=False)
        for path in ballast:
            os.unlink(path)
        shutil.rmtree(self.here)
        write_file(self.here, b"after all")
        self.assertRecovers(self.c)

    def test_no_room_for_a_restore(self):
        make_tree(self.here, {"f%d" % number: 300000 for number in range(10)})
        target, name = self.c.path("target"), os.path.basename(self.here)
        tmpfs_or_skip(self, target, "1m")
        self.c.settle()
        result = self.c.restore("a", "docs", name, to=target)
        self.assertRc(1, result)
        self.assertRegex(result.stderr, "(?i)no space|full")
        self.remount(target, "size=10m")
        self.assertRc(0, self.c.restore("a", "docs", name, to=target))
        self.assertSameTree(self.here, os.path.join(target, name))


class WrongDirectoryTest(FaultCase):
    """A backup's directory that is not the one it was: nothing is written there until somebody says that it is right."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", replicas=1)
        cls.source, cls.kept = cls.begin(cls.c)

    @staticmethod
    def begin(cluster):
        source, kept = cluster.source("docs", "s", {"f%d" % number: b"1" for number in range(5)}), cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        return source, kept

    def assertRefused(self, result, path, *words):
        self.assertRc(1, result)
        self.assertOneError(result, *words)
        self.assertEqual((0, 0), (result.json["copied_files"], result.json["updated_files"]))

    def test_an_empty_mount_point_is_not_filled_until_it_is_adopted(self):
        os.rename(self.kept, self.kept + ".away")
        os.mkdir(self.kept)
        for lost in (False, True):
            if lost:
                lose_state(self.c, "a")
            self.assertRefused(self.c.client("a"), self.kept, "b1", "--adopt b1")
            self.assertEqual({}, regular_files(self.kept, "docs"))
        self.assertRc(2, self.c.client("a", "--adopt", "nonsense"))
        self.assertRc(0, self.c.client("a", "--adopt", "b1"))
        self.assertRecovers(self.c)
        self.assertEqual(set(regular_files(self.source)), set(regular_files(self.kept, "docs")))
        shutil.rmtree(self.kept + ".away")

    def test_a_directory_that_comes_back_is_taken_as_it_is(self):
        os.rename(self.kept, self.kept + ".away")
        os.mkdir(self.kept)
        self.c.client("a")
        before = tree(self.kept + ".away/docs")
        shutil.rmtree(self.kept)
        os.rename(self.kept + ".away", self.kept)
        figures = self.assertRecovers(self.c)
        self.assertEqual(0, sum(one["wire_bytes"] for one in figures))
        self.assertEqual(before, tree(self.kept + "/docs"))

    def test_nor_has_it_to_be_adopted_when_state_was_lost_meanwhile(self):
        os.rename(self.kept, self.kept + ".away")
        os.mkdir(self.kept)
        lose_state(self.c, "a")
        before = tree(self.kept + ".away/docs")
        for _ in range(2):
            self.assertRefused(self.c.client("a"), self.kept, "b1", "--adopt b1")
            self.assertEqual({}, regular_files(self.kept, "docs"))
        shutil.rmtree(self.kept)
        os.rename(self.kept + ".away", self.kept)
        figures = self.assertRecovers(self.c)
        self.assertEqual(0, sum(one["wire_bytes"] for one in figures))
        self.assertEqual(before, tree(self.kept + "/docs"))

    def test_the_directory_under_another_name_or_on_two_machines_is_refused(self):
        cluster = self.cluster("s", "a", replicas=1)
        _, kept = self.begin(cluster)
        before = tree(kept)
        cluster.add_host("b")
        copy = cluster.path("b", "backup", "b2")
        shutil.copytree(kept, copy, symlinks=True)
        cluster.backups["b2"] = cluster.backups["b1"]._replace(name="b2", host="b", path=copy)
        self.assertRefused(cluster.client("b"), copy, "b2")
        self.assertRc(0, cluster.client("a"))        # knows the changed configuration now
        cluster.backups["other"] = cluster.backups.pop("b1")._replace(name="other")
        del cluster.backups["b2"]
        self.assertRefused(cluster.client("a"), kept, "other")
        self.assertEqual({name: entry for name, entry in before.items() if name.startswith("docs")},
                         {name: entry for name, entry in tree(kept).items() if name.startswith("docs")})

    def test_a_directory_that_was_copied_with_its_machine_and_is_used_on_both_is_never_counted_for_what_it_lacks(self):
        def swap():     # the other machine's turn: it has the same name, and the directory at the same path
            for path in (self.kept, self.c.home("a")):
                os.rename(path, path + ".t")
                os.rename(path + ".twin", path)
                os.rename(path + ".t", path + ".twin")

        for path in (self.kept, self.c.home("a")):
            shutil.copytree(path, path + ".twin", symlinks=True)
        for turn in range(3):       # each of the two is the first to hear of something, and the second, and was both before
            write_file(os.path.join(self.source, "f%d" % turn), "changed %d" % turn)
            make_tree(self.source, {"new %d" % turn: 100 + turn})
            if turn == 1:
                os.unlink(os.path.join(self.source, "f4"))
            self.assertRc(0, self.c.client("a", "--until-settled"))
            self.assertHolds(self.c)
            swap()
            self.assertRc(0, self.c.client("a", "--until-settled"))
            self.assertHolds(self.c)
        for path in (self.kept, self.c.home("a")):
            shutil.rmtree(path + ".twin")

    def test_a_directory_of_another_cluster_is_refused(self):
        with Cluster("s", "a", replicas=1) as other:
            pem = new_cluster_pem()
            for host in other.hosts:
                write_file(os.path.join(other.home(host), "cluster.pem"), pem)
            other.source("docs", "s", {"g": b"2"})
            other.backups["b1"] = self.c.backups["b1"]
            other.start("s")
            self.assertRefused(other.client("a"), self.kept, "b1", "another cluster")
            self.assertRefused(other.client("a", "--adopt", "b1"), self.kept, "b1", "another cluster")
        self.assertRecovers(self.c, 1)


class DropTest(FaultCase):
    """No copy is deleted without a grant, and no grant leaves less than N copies, whoever asks at the same time."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", "c", replicas=3)
        c.source("docs", "s", {"f%02d" % number: 20000 for number in range(20)})
        for host in "abc":
            c.backup("b" + host, host, "9M")
        c.start()
        c.settle()
        c.keys["replicas"] = 2
        for name in c.backups:      # no room at all: each wants to be rid of everything
            c.backups[name] = c.backups[name]._replace(options={"size": "100"})
        c.write_config()

    def counts(self):
        return [len(hosts) for hosts in holders(self.c, "docs").values()]

    def setUp(self):
        if "s" in self.c.servers:
            self.c.kill("s")

    def test_1_without_the_server_nothing_is_deleted(self):
        for host in "abc":
            result = self.c.client(host)
            self.assertRc(1, result)
            self.assertEqual(0, result.json["dropped_files"])
        self.assertEqual([3] * 20, self.counts())

    def test_2_those_who_ask_at_the_same_time_leave_enough_also_when_they_are_killed(self):
        self.c.start("s")
        for point in ("granted", "drop-before-delete", None):
            more = {"CBACKUP_TEST_KILL": point} if point else {}
            for client in [self.c.spawn(host, "client", "--json", **more) for host in "abc"]:
                client.wait()
            self.assertGreaterEqual(min(self.counts()), 2)
            self.assertHolds(self.c, settled=False, sizes=False)
        for host in "abc":
            self.c.client(host)
        self.assertEqual([2] * 20, self.counts())


class SoakTest(Case):
    """A short random history; `python3 -m tests.soak` runs longer ones."""

    def test_a_short_random_history(self):
        soak.run(seed=7, deadline=time.monotonic() + 12, out=sys.stderr, periods=len(self.todays(range(2), 1)))


class TwiceTest(FaultCase):
    """Two of a kind at once."""

    def test_a_second_server_of_a_host_is_refused_and_the_first_goes_on(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        second = cluster.run("s", "server", timeout=20)
        self.assertRc(1, second)
        self.assertOneError(second, "is in use by another cbackup")
        cluster.settle()

    def test_verify_leaves_a_backup_alone_in_which_a_client_is_at_work_and_a_restore_has_what_was_there_before(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"before": 1000}, bwlimit="1M")
        kept, target = cluster.backup("b1", "a", "9M"), cluster.path("target")
        cluster.start()
        cluster.settle()
        before = tree(source)
        make_tree(source, {"f%d" % number: 50000 for number in range(20)})
        client = cluster.spawn("a", "client", "--json")
        self.addCleanup(client.kill)
        wait_for(lambda: regular_files(kept, ".cbackup/incoming"), 20, "the client does nothing")
        client.signal(signal.SIGSTOP)
        result = cluster.run("a", "verify", timeout=20)
        self.assertRc(0, result)
        self.assertRegex(result.text, r"(?i)\bb1\b.*(at work|busy|locked)")
        self.assertRc(0, cluster.restore("s", "docs", to=target))
        self.assertSameTree(before, target, ignore=("dir.mtime_ns",))
        client.signal(signal.SIGCONT)
        self.assertRc(0, client.wait())
        self.assertRecovers(cluster, 1)
        self.assertRc(0, cluster.restore("s", "docs", to=target))
        self.assertSameTree(source, target)

    def test_a_client_leaves_a_backup_alone_in_which_a_verify_is_at_work(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f%d" % number: 40000 for number in range(10)})
        kept = cluster.backup("b1", "a", "9M", read_rate="200K")
        cluster.start()
        cluster.settle()
        for _ in range(10):     # who looks whether it is locked may lock it out: it ends at once then
            verify = cluster.spawn("a", "verify")
            self.addCleanup(verify.kill)
            wait_for(lambda: is_locked(os.path.join(kept, ".cbackup", "lock")) or not verify.running, 20, "it does nothing")
            if verify.running:
                break
        verify.signal(signal.SIGSTOP)
        write_file(os.path.join(source, "f0"), "changed")
        before = tree(kept)
        result = cluster.client("a", "-v")
        self.assertRc(0, result)
        self.assertRegex(result.stderr, r"(?i)\bb1\b.*at work")
        self.assertEqual(before, tree(kept))
        verify.signal(signal.SIGCONT)
        self.assertRc(0, verify.wait())
        self.assertRecovers(cluster, 2)


def is_locked(path):
    """Whether another process has locked a file."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


if __name__ == "__main__":
    unittest.main()
