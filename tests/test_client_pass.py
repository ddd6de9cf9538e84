"""A client's pass: what it copies and where, what it does about changes, and when it does nothing."""

import contextlib
import os
import shutil
import signal
import stat
import unittest
import unittest.mock

import cbackup
from tests.harness import (CLIENT_KEYS, DIRECTORY, Case, Link, inodes, make_tree, read_file, some_bytes, wait_for,
                           write_file)
from tests.members import one_pass


class FiguresTest(Case):
    """`client --json` says what the pass did, in the words of the contract."""

    def start(self, size="10M", **options):
        cluster = self.cluster("s", "a", "b")
        self.files = {"one": 1000, "two": 20000, "dir/three": 300000, "empty": 0, "link": Link("one"),
                      "void": DIRECTORY}
        self.source = cluster.source("docs", "s", self.files)
        cluster.backup("b1", "a", size, **options)
        cluster.backup("b2", "b", size, **options)
        cluster.start()
        return cluster

    def figures(self, cluster, host):
        result = cluster.client(host)
        self.assertRc(0, result)
        figures = result.json
        self.assertEqual(CLIENT_KEYS, set(figures))
        for key, value in figures.items():
            kind = {"unreachable": list, "settled": bool}.get(key, int)
            self.assertIs(kind, type(value), (key, value))
        return figures

    def test_the_first_copies_are_counted_and_the_last_pass_is_settled(self):
        cluster = self.start()
        for host in ("a", "b"):
            figures = self.figures(cluster, host)
            self.assertEqual((4, 321000, 0, 0, 0, []), (
                figures["copied_files"], figures["copied_bytes"], figures["updated_files"], figures["dropped_files"],
                figures["failed_files"], figures["unreachable"]))
            self.assertFalse(figures["settled"], "a pass that copied something had something to do")
            self.assertGreaterEqual(figures["wire_bytes"], 321000)
            self.assertLess(figures["wire_bytes"], 321000 * 1.1 + 10000)
        for host in ("a", "b"):
            figures = self.figures(cluster, host)
            self.assertTrue(figures.pop("settled"))
            self.assertEqual([], figures.pop("unreachable"))
            self.assertEqual({0}, set(figures.values()), figures)

    def test_a_pass_is_not_settled_while_files_are_short_of_copies(self):
        cluster = self.start()
        self.figures(cluster, "a")
        self.assertFalse(self.figures(cluster, "a")["settled"], "b has not copied anything yet")

    def test_a_change_is_an_update_and_no_copy(self):
        cluster = self.start()
        cluster.settle()
        write_file(os.path.join(self.source, "two"), some_bytes(20001, "new"))
        figures = self.figures(cluster, "a")
        self.assertEqual((1, 0, 0), (figures["updated_files"], figures["copied_files"], figures["failed_files"]))
        self.assertFalse(figures["settled"])
        self.assertEqual(["b1"], cluster.copies_on_disk("docs")["two"])

    def test_a_source_of_its_own_host_is_none_of_a_clients_business(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("own", "s", "1M")
        cluster.backup("b1", "a", "1M")
        cluster.start()
        self.assertEqual(0, self.figures(cluster, "s")["copied_files"])
        self.assertEqual(1, self.figures(cluster, "a")["copied_files"])
        self.assertEqual({"f": ["b1"]}, cluster.copies_on_disk("docs"))


class DistinctHostsTest(Case):
    """N copies are copies on N distinct hosts, none of which is the source's own."""

    def test_the_sources_own_host_never_holds_a_copy_and_a_host_never_two(self):
        cluster = self.cluster("s", "a", "b", "c")
        cluster.source("docs", "s", {"f%d" % number: 100 + number for number in range(30)})
        cluster.source("other", "a", {"f%d" % number: 100 + number for number in range(30)})
        for name, host in (("s1", "s"), ("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
            cluster.backup(name, host, "1M")
        cluster.start()
        cluster.settle()
        self.assertCopies(cluster, "docs", 2)
        self.assertCopies(cluster, "other", 2)
        self.assertFalse(os.path.exists(cluster.kept_as("s1", "docs", "f0")))

    def test_two_backups_on_one_host_count_once(self):
        cluster = self.cluster("s", "a", "b")
        names = {"f%d" % number for number in range(10)}
        cluster.source("docs", "s", {name: 100 for name in names})
        cluster.backup("a1", "a", "1M")
        cluster.backup("a2", "a", "1M")
        cluster.start("s", "a")
        for _ in range(3):
            last = cluster.client("a")
        self.assertFalse(last.json["settled"])
        self.assertEqual({name: 1 for name in names},
                         {name: len(backups) for name, backups in cluster.copies_on_disk("docs").items()})
        docs = cluster.status()["sources"]["docs"]
        self.assertEqual((10, 10, 0), (docs["copies"]["1"], docs["underserved_files"], docs["overserved_files"]))

    def test_each_source_has_as_many_copies_as_its_line_says(self):
        cluster = self.cluster("s", "a", "b", "c")
        for count in (1, 2, 3):
            cluster.source("docs%d" % count, "s", {"f%d" % number: 100 for number in range(10)}, replicas=count)
        for host in "abc":
            cluster.backup("b" + host, host, "1M")
        cluster.start()
        cluster.settle()
        for count in (1, 2, 3):
            self.assertCopies(cluster, "docs%d" % count, count)

    def test_files_that_were_put_into_a_backup_by_hand_do_not_count(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": b"right", "g": b"right"})
        kept = cluster.backup("b1", "a", "1M")
        make_tree(os.path.join(kept, "docs"), {"f": b"wrong"})
        info = os.stat(os.path.join(source, "f"))
        os.utime(os.path.join(kept, "docs", "f"), ns=(info.st_atime_ns, info.st_mtime_ns))
        cluster.start()
        self.assertRc(1, cluster.client("a"))       # a directory in use is no backup, until somebody says so
        cluster.client("a", "--adopt", "b1")        # may complain of what it found there
        cluster.settle()
        self.assertCopies(cluster, "docs", 1)


class ChangesTest(Case):
    """Changes arrive at the next pass; what was there before is a plain file in the attic."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        cls.source = cls.c.source("docs", "s", {"stay%d" % number: 100 for number in range(40)})
        cls.c.backup("b1", "a", "20M")
        cls.c.backup("b2", "b", "20M")
        cls.c.start()

    def add(self, hosts="a", **files):
        """New files, and a pass of these hosts: where it is looked at one backup, that of the other host is the same."""
        make_tree(self.source, files)
        self.c.round(hosts=hosts)
        return [os.path.join(self.source, name) for name in files]

    def pass_of_a(self):
        self.c.round(hosts="a")

    def attic(self):
        return [content for _, content in self.c.attic("b1", "docs")]

    def test_a_change_arrives_and_the_old_version_is_in_the_attic(self):
        path, = self.add(changing=b"version 1")
        for number in (2, 3):
            write_file(path, "version %d" % number)
            self.pass_of_a()
            self.assertEqual(b"version %d" % number, read_file(self.c.kept_as("b1", "docs", "changing")))
            for old in range(1, number):
                self.assertEqual(1, self.attic().count(b"version %d" % old))

    def test_an_old_version_keeps_its_mode_and_time(self):
        path, = self.add(dated=b"old and dated")
        os.chmod(path, 0o604)
        os.utime(path, ns=(5, 1111111111222222222))
        self.pass_of_a()
        write_file(path, "new and dated")
        self.pass_of_a()
        attic = os.path.join(self.c.backups["b1"].path, ".cbackup", "attic", "docs")
        found = [os.stat(os.path.join(attic, name)) for name, content in self.c.attic("b1", "docs")
                 if content == b"old and dated"]
        self.assertIn((0o604, 1111111111222222222), [(stat.S_IMODE(info.st_mode), info.st_mtime_ns) for info in found])

    def test_a_disk_that_is_put_back_as_it_was_gets_the_modes_of_today(self):
        path, = self.add(moded=b"mode")
        self.c.settle()
        disk = self.c.backups["b1"].path
        shutil.copytree(disk, disk + " old", symlinks=True)
        os.chmod(path, 0o640)
        self.c.settle()
        shutil.rmtree(disk)
        os.rename(disk + " old", disk)
        self.assertRc(0, self.c.client("a"))
        self.assertEqual(0o640, stat.S_IMODE(os.stat(self.c.kept_as("b1", "docs", "moded")).st_mode))

    def test_a_file_is_replaced_and_never_written_in_place(self):
        old, new = some_bytes(500000, "old"), some_bytes(500000, "old")[:-10] + b"0123456789"
        path, = self.add(inplace=old)
        with open(self.c.kept_as("b1", "docs", "inplace"), "rb") as file:
            write_file(path, new)
            self.pass_of_a()
            self.assertEqual(old, file.read())
        self.assertEqual(new, read_file(self.c.kept_as("b1", "docs", "inplace")))

    def test_a_deleted_file_goes_to_the_attic(self):
        path, = self.add(deleted=b"last words")
        os.unlink(path)
        self.pass_of_a()
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", "deleted")))
        self.assertEqual(1, self.attic().count(b"last words"))

    def test_a_deleted_directory_goes_to_the_attic_and_leaves_no_empty_one(self):
        make_tree(self.source, {"gone/a/1": b"first gone", "gone/b/2": b"second gone", "gone/void": DIRECTORY})
        self.pass_of_a()
        shutil.rmtree(os.path.join(self.source, "gone"))
        self.pass_of_a()
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", "gone")))
        self.assertEqual(2, sum(content in (b"first gone", b"second gone") for content in self.attic()))

    def test_a_file_that_comes_back_is_copied_again(self):
        path, = self.add("ab", returning=b"I will be back")
        os.unlink(path)
        self.c.round()
        self.add("ab", returning=b"I am back")
        self.assertEqual(["b1", "b2"], self.c.copies_on_disk("docs")["returning"])

    def test_a_renamed_file_is_under_its_new_name_only(self):
        path, = self.add("ab", before=b"the same bytes")
        os.rename(path, os.path.join(self.source, "after"))
        self.c.round()
        self.assertEqual(["b1", "b2"], self.c.copies_on_disk("docs")["after"])
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", "before")))

    def test_of_two_that_are_swapped_one_is_missing(self):
        """The other one goes to its new place, counts there, and the missing one is copied again."""
        one, two = self.add("ab", lost1=b"was one", lost2=b"was two")
        os.unlink(self.c.kept_as("b1", "docs", "lost1"))
        for old, new in ((one, one + ".tmp"), (two, one), (one + ".tmp", two)):
            os.rename(old, new)
        before = os.stat(self.c.kept_as("b1", "docs", "lost2")).st_ino
        self.c.client("a")
        self.c.settle()
        self.assertEqual(before, os.stat(self.c.kept_as("b1", "docs", "lost1")).st_ino)
        for backup in ("b1", "b2"):
            self.assertEqual(b"was two", read_file(self.c.kept_as(backup, "docs", "lost1")))
            self.assertEqual(b"was one", read_file(self.c.kept_as(backup, "docs", "lost2")))

    def test_an_outdated_copy_of_a_file_that_is_renamed_goes_to_the_attic_and_not_to_the_new_name(self):
        c = self.cluster("s", "a", "b", replicas=1)
        source = c.source("docs", "s", {"f": b"version 1"})
        c.backup("ba", "a", "9M")
        c.start()
        c.settle()
        c.backup("bb", "b", "9M")
        write_file(os.path.join(source, "f"), b"version two")
        self.assertRc(0, c.client("b"))
        c.advance(4 * 3600)         # longer than a has to update its copy before others take the file
        self.assertEqual(1, c.client("b").json["copied_files"])
        os.rename(os.path.join(source, "f"), os.path.join(source, "g"))
        self.assertRc(0, c.client("a"))
        self.assertEqual([], [name for name in ("f", "g") if os.path.lexists(c.kept_as("ba", "docs", name))])
        self.assertEqual([b"version 1"], [content for _, content in c.attic("ba", "docs")])
        c.settle()
        self.assertEqual({"g": ["bb"]}, c.copies_on_disk("docs"))

    def test_swapped_files_are_swapped_in_the_backups(self):
        one, two = self.add("ab", swap1=b"was one", swap2=b"was two")
        os.rename(one, one + ".tmp")
        os.rename(two, one)
        os.rename(one + ".tmp", two)
        self.c.round()
        for backup in ("b1", "b2"):
            self.assertEqual(b"was two", read_file(self.c.kept_as(backup, "docs", "swap1")))
            self.assertEqual(b"was one", read_file(self.c.kept_as(backup, "docs", "swap2")))

    def test_a_copy_that_somebody_removed_by_hand_is_no_reason_to_lose_the_others(self):
        self.add("ab", removed=b"by mistake")
        os.unlink(self.c.kept_as("b1", "docs", "removed"))
        for _ in range(2):
            self.c.passes(["a", "b"])
        self.assertIn("b2", self.c.copies_on_disk("docs")["removed"])


class IdleTest(Case):
    """When nothing changes, nothing is transferred, deleted or rewritten, however often clients run."""

    def test_idle_passes_do_nothing_at_all(self):
        cluster = self.cluster("s", "a", "b")
        source = cluster.source("docs", "s", {"d%d/f%d" % (number % 3, number): 1000 for number in range(60)})
        make_tree(source, {"link": Link("nowhere"), "void": DIRECTORY, "changing": b"1"})
        for name, host in (("b1", "a"), ("b2", "b")):
            cluster.backup(name, host, "1M")
        cluster.start()
        cluster.settle()
        write_file(os.path.join(source, "changing"), "2")       # so that there is something in the attics
        os.unlink(os.path.join(source, "d0", "f0"))
        cluster.settle()
        before = [cluster.kept_inodes("b1"), cluster.kept_inodes("b2"), inodes(source)]
        self.assertGreater(len(before[0]), 60)
        status = cluster.status()["sources"]["docs"]
        for _ in range(3):
            for host in ("a", "b"):
                result = cluster.client(host)
                self.assertRc(0, result)
                self.assertTrue(result.json.pop("settled"))
                self.assertEqual({key: 0 for key in CLIENT_KEYS - {"settled", "unreachable"}},
                                 {key: result.json[key] for key in CLIENT_KEYS - {"settled", "unreachable"}})
        self.assertEqual(before, [cluster.kept_inodes("b1"), cluster.kept_inodes("b2"), inodes(source)])
        after = cluster.status()["sources"]["docs"]
        self.assertEqual(dict(status, last_scan=0), dict(after, last_scan=0))
        asked, call = [], cbackup.Link.call
        with unittest.mock.patch.object(cbackup.Link, "call", lambda link, operation, **fields: (
                asked.append((link.host, operation)), call(link, operation, **fields))[1]):
            one_pass(cluster, "a", cluster.config())
        for host in ("s", "a", "b"):        # each question is a journey, and many machines may be asked
            self.assertLessEqual(sum(where == host for where, _ in asked), 5, asked)
        self.assertIn(("s", "begin"), asked)

    def test_restarted_servers_are_no_reason_to_copy_again(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f%d" % number: 100 for number in range(10)})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        before = cluster.kept_inodes("b1")
        cluster.stop()
        cluster.start()
        cluster.kill("s")
        cluster.start("s")
        self.assertTrue(cluster.client("a").json["settled"])
        self.assertEqual(before, cluster.kept_inodes("b1"))


class AtWorkTest(Case):
    """One client at a time works in a backup; a second one says so and exits 0; a dead one leaves no lock."""

    def setUp(self):
        self.c = self.cluster("s", "a", replicas=1)
        self.c.source("docs", "s", {"d%d/f%d" % (number % 10, number): 30000 for number in range(300)})
        self.c.backup("b1", "a", "100M")
        self.c.start()

    def stopped_client(self):
        """A client that has been stopped in the middle of its work."""
        client = self.c.spawn("a", "client")
        self.addCleanup(client.kill)
        kept = os.path.join(self.c.backups["b1"].path, "docs")
        wait_for(lambda: os.path.isdir(kept) and any(os.scandir(kept)), 30, "the client copies nothing")
        client.signal(signal.SIGSTOP)
        self.assertTrue(client.running, "the client was too fast for this test")
        return client

    def test_a_second_client_leaves_it_alone_and_exits_0(self):
        first = self.stopped_client()
        self.assertSilent(self.c.run("a", "client", timeout=30))      # nothing for cron to mail
        second = self.c.client("a", "-v", timeout=30)
        self.assertRc(0, second)
        self.assertRegex(second.text, r"(?i)\bb1\b.*\b(already|another|at work|busy|locked)\b")
        self.assertEqual((0, 0), (second.json["copied_files"], second.json["failed_files"]))
        first.signal(signal.SIGCONT)
        self.assertSilent(first.wait())
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)

    def test_a_killed_client_leaves_no_lock_behind(self):
        self.stopped_client().kill()
        result = self.c.client("a", "--until-settled")
        self.assertRc(0, result)
        self.assertTrue(result.json["settled"])
        self.assertCopies(self.c, "docs", 1)


class OptionsTest(Case):
    """`exclude`, `size` and `reserve` on the line of a source or a backup."""

    def test_what_is_excluded_is_not_backed_up(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("home", "s", {"keep.txt": b"1", "x.tmp": b"2", "sub/y.tmp": b"3", "sub/keep": b"4",
                                              "Library/Caches/c": b"5", "Library/keep": b"6", "My Cache/z": b"7",
                                              "tmp": b"8", "x.tmpl": b"9"},
                                exclude=["*.tmp", "Library/Caches", "My Cache"])
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        kept = {name for name, backups in cluster.copies_on_disk("home").items() if backups}
        self.assertEqual({"keep.txt", "sub/keep", "Library/keep", "tmp", "x.tmpl"}, kept)
        self.assertEqual(5, cluster.status()["sources"]["home"]["files"])
        write_file(os.path.join(source, "another.tmp"), "x")
        self.assertEqual((0, True), (cluster.client("a").json["copied_files"], cluster.client("a").json["settled"]))

    def test_a_backup_never_keeps_more_than_its_size(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f%d" % number: 100000 for number in range(10)})
        cluster.backup("b1", "a", "500000")
        cluster.start()
        client = cluster.spawn("a", "client", "--json")
        while not client.ends_within(0.005):
            self.assertLessEqual(cluster.kept_bytes("b1"), 500000)
        self.assertFalse(client.wait().json["settled"])
        self.assertEqual(500000, cluster.kept_bytes("b1"))
        docs = cluster.status()["sources"]["docs"]
        self.assertEqual((5, 500000), (docs["underserved_files"], docs["underserved_bytes"]))
        again = cluster.client("a").json
        self.assertEqual((0, False), (again["copied_files"], again["settled"]))

    def test_old_versions_count_for_the_size_and_give_way_to_current_files(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": 100000, "g": 50000})
        cluster.backup("b1", "a", "300000")
        cluster.start()
        for number in range(6):
            write_file(os.path.join(source, "f"), some_bytes(100000, number))
            cluster.settle()
            self.assertCopies(cluster, "docs", 1)
            self.assertWithinSize(cluster)
        self.assertIn(some_bytes(100000, 4), [content for _, content in cluster.attic("b1", "docs")],
                      "the last old version had room")
        make_tree(source, {"h": 150000})
        cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        self.assertWithinSize(cluster)

    def test_a_file_that_grows_beyond_the_size_does_not_take_more_than_it(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": 100000, "g": 50000})
        cluster.backup("b1", "a", "200000")
        cluster.start()
        cluster.settle()
        write_file(os.path.join(source, "f"), some_bytes(300000, "grown"))
        for _ in range(2):
            result = cluster.client("a")
            self.assertFalse(result.json["settled"])
            self.assertWithinSize(cluster)
        self.assertEqual(["b1"], cluster.copies_on_disk("docs")["g"])
        self.assertEqual(1, cluster.status()["sources"]["docs"]["underserved_files"])

    def test_a_reserve_that_the_file_system_cannot_give_lets_nothing_in(self):
        cluster = self.cluster("s", "a", "b", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("b1", "a", reserve="1000000T")
        cluster.backup("b2", "b", reserve="1K")
        cluster.start()
        self.assertEqual((0, False), (cluster.client("a").json["copied_files"], cluster.client("a").json["settled"]))
        self.assertEqual({"f": []}, cluster.copies_on_disk("docs"))
        cluster.settle()
        self.assertEqual({"f": ["b2"]}, cluster.copies_on_disk("docs"))

    def test_a_reserve_is_left_free(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f%d" % number: 4 << 20 for number in range(20)})
        room = shutil.disk_usage(cluster.base).free - (30 << 20)
        cluster.backup("b1", "a", reserve=str(room))
        cluster.start()
        cluster.client("a")
        # Others use this file system too: no exact figure can be expected, but 80 MB do not fit into
        # 30, unless somebody made room meanwhile.
        if shutil.disk_usage(cluster.base).free < room:
            self.assertLess(cluster.kept_bytes("b1"), 60 << 20)


class UnreachableTest(Case):
    """A host that is down is named, exit code 1; all that can be done without it is done, and nothing is deleted."""

    def test_a_source_whose_host_is_down_is_left_as_it_is_and_the_others_are_served(self):
        cluster = self.cluster("s", "t", "a", replicas=1)
        one = cluster.source("one", "s", {"f": b"1", "g": b"2"})
        two = cluster.source("two", "t", {"f": b"1"})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        cluster.kill("s")
        before = {name: value for name, value in cluster.kept_inodes("b1").items() if name.startswith("one/")}
        os.unlink(os.path.join(one, "f"))
        write_file(os.path.join(two, "new"), "3")
        result = cluster.client("a")
        self.assertRc(1, result)
        self.assertEqual((["s"], 1, False), (result.json["unreachable"], result.json["copied_files"],
                                            result.json["settled"]))
        self.assertOneError(result, "s")
        self.assertRegex(result.stderr, r"\bs\b")
        self.assertEqual(before, {name: value for name, value in cluster.kept_inodes("b1").items()
                                  if name.startswith("one/")})
        cluster.start("s")
        cluster.settle()
        self.assertEqual({"g": ["b1"]}, cluster.copies_on_disk("one"))

    def test_a_backup_directory_that_is_not_there_is_named_and_not_made(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        kept = cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        # The disk is not mounted: what shows is the empty mount point, or nothing.
        os.rename(kept, kept + ".away")
        result = cluster.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "b1: ", kept, "has lost its .cbackup: is its disk mounted?")
        self.assertFalse(os.path.exists(os.path.join(kept, "docs")))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(kept)
        os.rename(kept + ".away", kept)
        cluster.settle()
        self.assertEqual({"f": ["b1"]}, cluster.copies_on_disk("docs"))


class UntilSettledTest(Case):
    """--until-settled repeats passes until one had nothing to do, also when that is not enough."""

    def test_it_ends_settled_when_that_is_possible(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f%d" % number: 100 for number in range(50)})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        result = cluster.client("a", "--until-settled")
        self.assertRc(0, result)
        self.assertTrue(result.json["settled"])
        self.assertEqual(CLIENT_KEYS, set(result.json))
        self.assertCopies(cluster, "docs", 1)

    def test_it_ends_when_this_host_can_do_no_more(self):
        cluster = self.cluster("s", "a", replicas=2)
        cluster.source("docs", "s", {"f%d" % number: 100 for number in range(50)})
        cluster.backup("b1", "a", "2K")
        cluster.start()
        result = cluster.client("a", "--until-settled", timeout=60)
        self.assertFalse(result.json["settled"])
        self.assertWithinSize(cluster)

    def test_several_hosts_at_once_end_with_the_right_number_of_copies(self):
        cluster = self.cluster("s", "a", "b", "c")
        cluster.source("docs", "s", {"f%d" % number: 1000 for number in range(200)})
        for host in "abc":
            cluster.backup("b" + host, host, "1M")
        cluster.start()
        clients = [cluster.spawn(host, "client", "--json", "--until-settled") for host in "abc"]
        for client in clients:
            result = client.wait()
            self.assertRc(0, result)
            self.assertEqual("", result.stderr)
        figures = cluster.settle()
        self.assertCopies(cluster, "docs", 2)
        self.assertEqual(0, sum(one["copied_files"] for one in figures), "the first passes were enough")


class HeldTest(Case):
    """A source that is suddenly empty, gone, or has lost or changed most of its files changes nothing in any backup."""

    COUNT = 25

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", replicas=1)
        cls.source = cls.c.source("docs", "s", {"d%d/f%d" % (number % 3, number): 100 for number in range(cls.COUNT)})
        cls.c.backup("b1", "a", "1M")
        cls.c.start()
        shutil.copytree(cls.source, cls.source + ".kept")

    def setUp(self):
        """The source as it was at the start, whatever has been done to it."""
        shutil.rmtree(self.source)
        shutil.copytree(self.source + ".kept", self.source)
        if self.c.client("a").rc != 0:      # most of its files are gone again
            self.c.run("s", "accept", "docs")
        self.c.settle()
        self.names = sorted(self.c.copies_on_disk("docs"))
        self.before = self.c.kept_inodes("b1")

    def assertHeld(self):
        for _ in range(2):
            result = self.c.client("a")
            self.assertEqual(self.before, self.c.kept_inodes("b1"))
            self.assertIn("docs", result.stderr, "nobody is told")
        status = self.c.run("s", "status", "--json")
        self.assertEqual("held", status.json["sources"]["docs"]["state"])
        check = self.c.run("s", "status", "--check")
        self.assertRc(1, check)
        self.assertIn("docs", check.stdout)
        self.assertIn("held", check.stdout)

    def assertReleased(self):
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)
        self.assertEqual("ok", self.c.status()["sources"]["docs"]["state"])

    def test_an_empty_source_is_held_until_its_files_are_back(self):
        os.rename(self.source, self.source + ".away")
        os.mkdir(self.source)
        self.assertHeld()
        os.rmdir(self.source)
        os.rename(self.source + ".away", self.source)
        self.assertReleased()
        self.assertEqual(self.before, self.c.kept_inodes("b1"))

    def test_a_source_that_is_gone_is_held_until_it_is_back(self):
        os.rename(self.source, self.source + ".away")
        self.assertHeld()
        os.rename(self.source + ".away", self.source)
        self.assertReleased()

    def test_a_source_that_became_something_else_is_held(self):
        os.rename(self.source, self.source + ".away")
        write_file(self.source, "no directory")
        self.assertHeld()
        os.unlink(self.source)
        os.rename(self.source + ".away", self.source)
        self.assertReleased()

    def test_a_source_that_lost_most_of_its_files_is_held(self):
        for name in self.names[:self.COUNT // 2 + 1]:
            os.unlink(os.path.join(self.source, name))
        self.assertHeld()

    def test_a_source_that_has_changed_in_most_of_its_files_is_held(self):
        for name in self.names[:self.COUNT // 2 + 1]:
            write_file(os.path.join(self.source, name), "encrypted by somebody")
        self.assertHeld()

    def test_a_held_source_stays_held_when_its_server_starts_again(self):
        for name in self.names[:self.COUNT // 2 + 1]:
            os.unlink(os.path.join(self.source, name))
        self.assertHeld()
        self.c.stop("s")
        self.c.start("s")
        self.assertHeld()

    def test_what_happened_while_the_server_was_down_is_held_as_well(self):
        self.c.stop("s")
        for name in self.names[:self.COUNT // 2 + 1]:
            os.unlink(os.path.join(self.source, name))
        self.c.start("s")
        self.assertHeld()

    def test_fewer_than_half_of_the_files_may_go_at_once(self):
        for name in self.names[:self.COUNT // 2]:
            os.unlink(os.path.join(self.source, name))
        self.c.settle()
        self.assertEqual(self.COUNT - self.COUNT // 2, len(self.c.copies_on_disk("docs")))
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", self.names[0])))

    def test_new_files_are_no_mass_change(self):
        make_tree(self.source, {"new%d" % number: 50 for number in range(3 * self.COUNT)})
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)

    def test_an_emptied_source_is_held_however_small_it_was(self):
        cluster = self.cluster("s", "a", replicas=1)
        path = cluster.source("small", "s", {"f": b"1", "g": b"2"})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        before = cluster.kept_inodes("b1")
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        cluster.client("a")
        self.assertEqual(before, cluster.kept_inodes("b1"))
        self.assertEqual("held", cluster.status()["sources"]["small"]["state"])


if __name__ == "__main__":
    unittest.main()
