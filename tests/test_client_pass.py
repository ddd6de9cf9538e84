"""A client's pass: what it copies and where, what it does about changes, and when it does nothing."""

import contextlib
import os
import shutil
import signal
import stat
import unittest
import unittest.mock

import cbackup
from tests.harness import (CLIENT_KEYS, DIRECTORY, Case, Link, inodes, make_tree, read_file, some_bytes, wait_for, walk,
                           write_file)
from tests.members import one_pass


class FiguresTest(Case):
    """`client --json` says what the pass did, in the words of the contract."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b")
        cls.source = c.source("docs", "s", {"one": 1000, "two": 20000, "dir/three": 300000, "empty": 0, "link": Link("one"),
                                            "void": DIRECTORY})
        cls.single = c.source("single", "s", replicas=1)
        for name, host in (("b1", "a"), ("b2", "b"), ("own", "s")):
            c.backup(name, host, "10M")
        c.start()
        cls.results = c.passes("aabab")
        write_file(os.path.join(cls.source, "two"), some_bytes(20001, "new"))
        cls.results += c.passes("a")
        cls.changed = c.copies_on_disk("docs")["two"]

    def figures(self, result):
        self.assertRc(0, result)
        figures = result.json
        self.assertEqual(CLIENT_KEYS, set(figures))
        for key, value in figures.items():
            kind = {"unreachable": list, "settled": bool}.get(key, int)
            self.assertIs(kind, type(value), (key, value))
        return figures

    def test_the_first_copies_are_counted_and_the_last_pass_is_settled(self):
        for number in (0, 2):
            figures = self.figures(self.results[number])
            self.assertEqual((4, 321000, 0, 0, 0, []), (
                figures["copied_files"], figures["copied_bytes"], figures["updated_files"], figures["dropped_files"],
                figures["failed_files"], figures["unreachable"]))
            self.assertFalse(figures["settled"], "a pass that copied something had something to do")
            self.assertGreaterEqual(figures["wire_bytes"], 321000)
            self.assertLess(figures["wire_bytes"], 321000 * 1.1 + 10000)
        for number in (3, 4):
            figures = self.figures(self.results[number])
            self.assertTrue(figures.pop("settled"))
            self.assertEqual([], figures.pop("unreachable"))
            self.assertEqual({0}, set(figures.values()), figures)

    def test_a_pass_is_not_settled_while_files_are_short_of_copies(self):
        self.assertFalse(self.figures(self.results[1])["settled"], "b has not copied anything yet")

    def test_a_change_is_an_update_and_no_copy(self):
        figures = self.figures(self.results[5])
        self.assertEqual((1, 0, 0), (figures["updated_files"], figures["copied_files"], figures["failed_files"]))
        self.assertFalse(figures["settled"])
        self.assertEqual(["b1"], self.changed)

    def test_a_source_of_its_own_host_is_none_of_a_clients_business(self):
        make_tree(self.single, {"f": b"1"})
        self.assertEqual(0, self.figures(self.c.client("s"))["copied_files"])
        self.assertEqual(1, self.figures(self.c.client("a"))["copied_files"])
        self.assertEqual({"f": ["b1"]}, self.c.copies_on_disk("single"))


class DistinctHostsTest(Case):
    """N copies are copies on N distinct hosts, none of which is the source's own."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", "c")
        for count in (1, 2, 3):
            c.source("docs%d" % count, "s", {"f%d" % number: 100 + number for number in range(10)}, replicas=count)
        c.source("other", "a", {"f%d" % number: 100 + number for number in range(20)})
        for name, host in (("s1", "s"), ("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
            c.backup(name, host, "1M")
        c.start()
        c.settle()

    def test_the_sources_own_host_never_holds_a_copy_and_a_host_never_two(self):
        self.assertCopies(self.c, "docs2", 2)
        self.assertCopies(self.c, "other", 2)
        self.assertFalse(os.path.exists(self.c.kept_as("s1", "docs2", "f0")))

    def test_each_source_has_as_many_copies_as_its_line_says(self):
        for count in (1, 2, 3):
            self.assertCopies(self.c, "docs%d" % count, count)

    def test_two_backups_on_one_host_count_once(self):
        cluster = self.cluster("s", "a", "b")
        names = {"f%d" % number for number in range(10)}
        cluster.source("docs", "s", {name: 100 for name in names})
        cluster.backup("a1", "a", "1M")
        cluster.backup("a2", "a", "1M")
        cluster.start("s", "a")
        for _ in range(2):
            last = cluster.client("a")
        self.assertFalse(last.json["settled"])
        self.assertEqual({name: 1 for name in names},
                         {name: len(backups) for name, backups in cluster.copies_on_disk("docs").items()})
        docs = cluster.status()["sources"]["docs"]
        self.assertEqual((10, 10, 0), (docs["copies"]["1"], docs["underserved_files"], docs["overserved_files"]))

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
        self.assertRc(0, cluster.client("a"))
        self.assertCopies(cluster, "docs", 1)


class ChangesTest(Case):
    """Changes arrive at the next pass; what was there before is a plain file in the attic."""

    @classmethod
    def setUpClass(cls):
        """Most tests look at what three passes of each host made of files of their own."""
        cls.c = c = cls.share_cluster("s", "a", "b")
        cls.source = c.source("docs", "s", {"stay%d" % number: 100 for number in range(60)})
        cls.single = c.source("single", "s", {"f": b"version 1"}, replicas=1)
        c.backup("b1", "a", "20M")
        c.backup("b2", "b", "20M")
        c.start()
        cls.kept, cls.attics = [], []       # after each turn: {path: bytes} in each backup, and what is in the attic of b1
        make_tree(cls.source, {
            "changing": b"version 1", "dated": b"old and dated", "inplace": cls.OLD, "deleted": b"last words",
            "gone/a/1": b"first gone", "gone/b/2": b"second gone", "gone/void": DIRECTORY, "returning": b"I will be back",
            "before": b"the same bytes", "lost1": b"was one", "lost2": b"was two", "swap1": b"was one, too",
            "swap2": b"was two, too", "removed": b"by mistake"})
        cls.passes()
        cls.swapped = [os.stat(c.kept_as("b1", "docs", "lost2")).st_ino]
        for name in ("lost1", "removed"):
            os.unlink(c.kept_as("b1", "docs", name))
        cls.write(changing="version 2", inplace=cls.NEW)
        os.chmod(cls.path("dated"), 0o604)
        os.utime(cls.path("dated"), ns=(5, 1111111111222222222))
        for name in ("deleted", "returning"):
            os.unlink(cls.path(name))
        shutil.rmtree(cls.path("gone"))
        for old, new in (("before", "after"), ("lost1", "t"), ("lost2", "lost1"), ("t", "lost2"),
                         ("swap1", "t"), ("swap2", "swap1"), ("t", "swap2")):
            os.rename(cls.path(old), cls.path(new))
        with open(c.kept_as("b1", "docs", "inplace"), "rb") as file:
            cls.passes()
            cls.still_open = file.read()
        cls.write(changing="version 3", dated="new and dated", returning="I am back")
        cls.passes()
        cls.swapped.append(os.stat(c.kept_as("b1", "docs", "lost1")).st_ino)

    OLD = some_bytes(500000, "old")
    NEW = OLD[:-10] + b"0123456789"

    @classmethod
    def path(cls, name):
        return os.path.join(cls.source, name)

    @classmethod
    def write(cls, **files):
        for name, content in files.items():
            write_file(cls.path(name), content)

    @classmethod
    def passes(cls):
        for host in "ab":
            cls.c.round(hosts=host)
        cls.kept.append({backup: {name: read_file(path) for name, path, info in walk(cls.c.kept_as(backup, "docs"))
                                  if not stat.S_ISDIR(info.st_mode)} for backup in cls.c.backups})
        cls.attics.append([content for _, content in cls.c.attic("b1", "docs")])

    def pass_of_a(self):
        self.c.round(hosts="a")

    def assertKept(self, turn, **files):
        """What was in both backups under these names; None: nothing, and no directory either."""
        for backup, kept in self.kept[turn].items():
            self.assertEqual(files, {name: kept.get(name) for name in files}, backup)

    def test_a_change_arrives_and_the_old_version_is_in_the_attic(self):
        for turn in (1, 2):
            self.assertKept(turn, changing=b"version %d" % (turn + 1))
            for old in range(1, turn + 1):
                self.assertEqual(1, self.attics[turn].count(b"version %d" % old))

    def test_an_old_version_keeps_its_mode_and_time(self):
        attic = os.path.join(self.c.backups["b1"].path, ".cbackup", "attic", "docs")
        found = [os.stat(os.path.join(attic, name)) for name, content in self.c.attic("b1", "docs")
                 if content == b"old and dated"]
        self.assertIn((0o604, 1111111111222222222), [(stat.S_IMODE(info.st_mode), info.st_mtime_ns) for info in found])

    def test_a_disk_that_is_put_back_as_it_was_gets_the_modes_of_today(self):
        self.write(moded="mode")
        self.pass_of_a()
        disk = self.c.backups["b1"].path
        shutil.copytree(disk, disk + " old", symlinks=True)
        os.chmod(self.path("moded"), 0o640)
        self.pass_of_a()
        shutil.rmtree(disk)
        os.rename(disk + " old", disk)
        self.pass_of_a()
        self.assertEqual(0o640, stat.S_IMODE(os.stat(self.c.kept_as("b1", "docs", "moded")).st_mode))

    def test_a_file_is_replaced_and_never_written_in_place(self):
        self.assertEqual(self.OLD, self.still_open)
        self.assertKept(1, inplace=self.NEW)

    def test_a_deleted_file_goes_to_the_attic(self):
        self.assertKept(1, deleted=None)
        self.assertEqual(1, self.attics[1].count(b"last words"))

    def test_a_deleted_directory_goes_to_the_attic_and_leaves_no_empty_one(self):
        self.assertEqual([b"first gone", b"second gone"], [self.kept[0]["b1"].get(name) for name in ("gone/a/1", "gone/b/2")])
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", "gone")))
        self.assertEqual(2, sum(content in (b"first gone", b"second gone") for content in self.attics[1]))

    def test_a_file_that_comes_back_is_copied_again(self):
        self.assertKept(1, returning=None)
        self.assertKept(2, returning=b"I am back")

    def test_a_renamed_file_is_under_its_new_name_only(self):
        self.assertKept(1, before=None, after=b"the same bytes")

    def test_of_two_that_are_swapped_one_is_missing(self):
        """The other one goes to its new place, counts there, and the missing one is copied again."""
        self.assertEqual(*self.swapped)
        self.assertKept(2, lost1=b"was two", lost2=b"was one")

    def test_an_outdated_copy_of_a_file_that_is_renamed_goes_to_the_attic_and_not_to_the_new_name(self):
        c = self.c
        self.assertEqual({"f": ["b1"]}, c.copies_on_disk("single"))
        write_file(os.path.join(self.single, "f"), b"version two")
        self.assertRc(0, c.client("b"))
        c.advance(4 * 3600)         # longer than a has to update its copy before others take the file
        self.assertEqual(1, c.client("b").json["copied_files"])
        os.rename(os.path.join(self.single, "f"), os.path.join(self.single, "g"))
        self.assertRc(0, c.client("a"))
        self.assertEqual([], [name for name in ("f", "g") if os.path.lexists(c.kept_as("b1", "single", name))])
        self.assertEqual([b"version 1"], [content for _, content in c.attic("b1", "single")])
        self.assertRc(0, c.client("b"))
        self.assertEqual({"g": ["b2"]}, c.copies_on_disk("single"))

    def test_swapped_files_are_swapped_in_the_backups(self):
        self.assertKept(1, swap1=b"was two, too", swap2=b"was one, too")

    def test_a_copy_that_somebody_removed_by_hand_is_no_reason_to_lose_the_others(self):
        for turn in (1, 2):
            self.assertEqual(b"by mistake", self.kept[turn]["b2"].get("removed"))


class IdleTest(Case):
    """When nothing changes, nothing is transferred, deleted or rewritten, however often clients run."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b")
        cls.source = c.source("docs", "s", {"d%d/f%d" % (number % 3, number): 1000 for number in range(60)})
        make_tree(cls.source, {"link": Link("nowhere"), "void": DIRECTORY, "changing": b"1"})
        for name, host in (("b1", "a"), ("b2", "b")):
            c.backup(name, host, "1M")
        c.start()
        c.round()

    def test_idle_passes_do_nothing_at_all(self):
        cluster, source = self.c, self.source
        write_file(os.path.join(source, "changing"), "2")       # so that there is something in the attics
        os.unlink(os.path.join(source, "d0", "f0"))
        cluster.settle()
        before = [cluster.kept_inodes("b1"), cluster.kept_inodes("b2"), inodes(source)]
        self.assertGreater(len(before[0]), 60)
        status = cluster.status()["sources"]["docs"]
        for _ in range(2):
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
        self.c.round(hosts="a")
        before = self.c.kept_inodes("b1")
        self.c.stop("s", "a")
        self.c.start()
        self.c.kill("s")
        self.c.start("s")
        self.assertTrue(self.c.client("a").json["settled"])
        self.assertEqual(before, self.c.kept_inodes("b1"))


class AtWorkTest(Case):
    """One client at a time works in a backup; a second one says so and exits 0; a dead one leaves no lock."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"stay": 100})
        c.backup("b1", "a", "100M")
        c.start()

    def stopped_client(self, folder):
        """A client that has been stopped in the middle of its work."""
        make_tree(self.source, {"%s/d%d/f%d" % (folder, number % 10, number): 30000 for number in range(300)})
        client = self.c.spawn("a", "client")
        self.addCleanup(client.kill)
        kept = self.c.kept_as("b1", "docs", folder)
        wait_for(lambda: os.path.isdir(kept) and any(os.scandir(kept)), 30, "the client copies nothing")
        client.signal(signal.SIGSTOP)
        self.assertTrue(client.running, "the client was too fast for this test")
        return client

    def test_a_second_client_leaves_it_alone_and_exits_0(self):
        first = self.stopped_client("first")
        self.assertSilent(self.c.run("a", "client", timeout=30))      # nothing for cron to mail
        second = self.c.client("a", "-v", timeout=30)
        self.assertRc(0, second)
        self.assertRegex(second.text, r"(?i)\bb1\b.*\b(already|another|at work|busy|locked)\b")
        self.assertEqual((0, 0), (second.json["copied_files"], second.json["failed_files"]))
        first.signal(signal.SIGCONT)
        self.assertSilent(first.wait())
        self.assertCopies(self.c, "docs", 1)

    def test_a_killed_client_leaves_no_lock_behind(self):
        self.stopped_client("killed").kill()
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
        cluster.round()
        kept = {name for name, backups in cluster.copies_on_disk("home").items() if backups}
        self.assertEqual({"keep.txt", "sub/keep", "Library/keep", "tmp", "x.tmpl"}, kept)
        self.assertEqual(5, cluster.status()["sources"]["home"]["files"])
        write_file(os.path.join(source, "another.tmp"), "x")
        again = cluster.client("a").json
        self.assertEqual((0, True), (again["copied_files"], again["settled"]))

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
        for number in range(4):     # the first old version makes way in the last turn
            write_file(os.path.join(source, "f"), some_bytes(100000, number))
            cluster.round()
            self.assertCopies(cluster, "docs", 1)
            self.assertWithinSize(cluster)
        self.assertIn(some_bytes(100000, 2), [content for _, content in cluster.attic("b1", "docs")],
                      "the last old version had room")
        make_tree(source, {"h": 150000})
        cluster.round()
        self.assertCopies(cluster, "docs", 1)
        self.assertWithinSize(cluster)

    def test_a_file_that_grows_beyond_the_size_does_not_take_more_than_it(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": 100000, "g": 50000})
        cluster.backup("b1", "a", "200000")
        cluster.start()
        cluster.round()
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
        refused = cluster.client("a").json
        self.assertEqual((0, False), (refused["copied_files"], refused["settled"]))
        self.assertEqual({"f": []}, cluster.copies_on_disk("docs"))
        cluster.round(hosts="b")
        self.assertEqual({"f": ["b2"]}, cluster.copies_on_disk("docs"))

    def test_a_reserve_is_left_free(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s")
        for number in range(20):
            write_file(os.path.join(source, "f%d" % number), b"")
            os.truncate(os.path.join(source, "f%d" % number), (3 << 20) + number)      # takes no room itself
        room = shutil.disk_usage(cluster.base).free - (20 << 20)
        cluster.backup("b1", "a", reserve=str(room))
        cluster.start()
        cluster.client("a")
        # Others use this file system too: no exact figure can be expected, but 60 MB do not fit into
        # 20, unless somebody made room meanwhile.
        if shutil.disk_usage(cluster.base).free < room:
            self.assertLess(cluster.kept_bytes("b1"), 40 << 20)


class UnreachableTest(Case):
    """A host that is down is named, exit code 1; all that can be done without it is done, and nothing is deleted."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "t", "a", replicas=1)
        cls.one = c.source("one", "s", {"f": b"1", "g": b"2"})
        cls.two = c.source("two", "t", {"f": b"1"})
        cls.kept = c.backup("b1", "a", "1M")
        c.start()
        c.round()

    def test_a_source_whose_host_is_down_is_left_as_it_is_and_the_others_are_served(self):
        cluster, one, two = self.c, self.one, self.two
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
        cluster.round()
        self.assertEqual({"g": ["b1"]}, cluster.copies_on_disk("one"))

    def test_a_backup_directory_that_is_not_there_is_named_and_not_made(self):
        cluster, kept = self.c, self.kept
        # The disk is not mounted: what shows is the empty mount point, or nothing.
        os.rename(kept, kept + ".away")
        result = cluster.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "b1: ", kept, "has lost its .cbackup: is its disk mounted?")
        self.assertEqual([], [name for name in ("one", "two") if os.path.exists(os.path.join(kept, name))])
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(kept)
        os.rename(kept + ".away", kept)
        cluster.settle()
        self.assertCopies(cluster, "one", 1)
        self.assertCopies(cluster, "two", 1)


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
        cluster.source("docs", "s", {"f%d" % number: 1000 for number in range(120)})
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
    HELD = ("empty", "gone", "other", "lost", "changed", "down", "small")

    @classmethod
    def setUpClass(cls):
        """There is a source for each thing that happens, and it happens to all of them at the same time."""
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        files = {"d%d/f%d" % (number % 3, number): 100 for number in range(cls.COUNT)}
        cls.names = sorted(files)
        cls.sources = {name: c.source(name, "s", {"f": b"1", "g": b"2"} if name == "small" else files)
                       for name in cls.HELD + ("fewer", "new")}
        c.backup("b1", "a", "1M")
        c.start()
        c.round()
        cls.before = c.kept_inodes("b1")
        for name in ("empty", "gone", "other"):
            os.rename(cls.sources[name], cls.sources[name] + ".away")
        os.mkdir(cls.sources["empty"])
        write_file(cls.sources["other"], "no directory")
        for name in os.listdir(cls.sources["small"]):
            os.unlink(os.path.join(cls.sources["small"], name))
        cls.remove("lost", cls.COUNT // 2 + 1)
        cls.remove("fewer", cls.COUNT // 2)
        for name in cls.names[:cls.COUNT // 2 + 1]:
            write_file(os.path.join(cls.sources["changed"], name), "encrypted by somebody")
        make_tree(cls.sources["new"], {"new%d" % number: 50 for number in range(3 * cls.COUNT)})
        cls.first = cls.look()
        c.stop("s")
        cls.remove("down", cls.COUNT // 2 + 1)
        c.start("s")
        cls.second = cls.look()
        for name in ("empty", "other"):
            os.rmdir(cls.sources[name]) if name == "empty" else os.unlink(cls.sources[name])
        for name in ("empty", "gone", "other"):
            os.rename(cls.sources[name] + ".away", cls.sources[name])
        cls.released = c.client("a"), c.status()

    @classmethod
    def remove(cls, source, count):
        for name in cls.names[:count]:
            os.unlink(os.path.join(cls.sources[source], name))

    @classmethod
    def look(cls):
        """What two passes say and leave, and what `status` and `status --check` say then."""
        passes = [(cls.c.client("a"), cls.c.kept_inodes("b1")) for _ in range(2)]
        return passes, cls.c.run("s", "status", "--json"), cls.c.run("s", "status", "--check")

    def of(self, source, kept):
        return {name: inode for name, inode in kept.items() if name.startswith((source + "/", ".cbackup/attic/" + source + "/"))}

    def assertHeld(self, source, looked):
        passes, status, check = looked
        for result, kept in passes:
            self.assertEqual(self.of(source, self.before), self.of(source, kept))
            self.assertIn("cbackup: %s is held: " % source, result.stderr, "nobody is told")
        self.assertEqual("held", status.json["sources"][source]["state"])
        self.assertRc(1, check)
        self.assertRegex(check.stdout, r"(?m)^.*\b%s is held" % source)

    def assertReleased(self, source):
        result, status = self.released
        self.assertNotIn("cbackup: %s " % source, result.stderr)
        self.assertEqual((0, 0), (result.json["copied_files"], result.json["failed_files"]))
        self.assertCopies(self.c, source, 1)
        self.assertEqual("ok", status["sources"][source]["state"])

    def test_an_empty_source_is_held_until_its_files_are_back(self):
        self.assertHeld("empty", self.first)
        self.assertReleased("empty")
        self.assertEqual(self.of("empty", self.before), self.of("empty", self.c.kept_inodes("b1")))

    def test_a_source_that_is_gone_is_held_until_it_is_back(self):
        self.assertHeld("gone", self.first)
        self.assertReleased("gone")

    def test_a_source_that_became_something_else_is_held(self):
        self.assertHeld("other", self.first)
        self.assertReleased("other")

    def test_a_source_that_lost_most_of_its_files_is_held(self):
        self.assertHeld("lost", self.first)

    def test_a_source_that_has_changed_in_most_of_its_files_is_held(self):
        self.assertHeld("changed", self.first)

    def test_a_held_source_stays_held_when_its_server_starts_again(self):
        for looked in (self.first, self.second):
            self.assertHeld("lost", looked)

    def test_what_happened_while_the_server_was_down_is_held_as_well(self):
        self.assertHeld("down", self.second)

    def test_fewer_than_half_of_the_files_may_go_at_once(self):
        self.assertEqual(self.COUNT - self.COUNT // 2, len(self.c.copies_on_disk("fewer")))
        self.assertCopies(self.c, "fewer", 1)
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "fewer", self.names[0])))

    def test_new_files_are_no_mass_change(self):
        self.assertCopies(self.c, "new", 1)

    def test_an_emptied_source_is_held_however_small_it_was(self):
        self.assertHeld("small", self.first)


if __name__ == "__main__":
    unittest.main()
