"""What becomes of changes: renames are renames, kinds change, old versions stay for a while."""

import os
import shutil
import unittest

from tests.faults import regular_files, violations
from tests.harness import DIRECTORY, Case, Link, differences, make_tree, read_file, some_bytes, tree, write_file

SIZE = 20000        # of each file: large enough to be noticed on the wire


def rename(top, *pairs):
    """Renames below a directory, one after the other; parents are made."""
    for old, new in pairs:
        os.makedirs(os.path.dirname(os.path.join(top, new)), exist_ok=True)
        os.rename(os.path.join(top, old), os.path.join(top, new))


def into_itself(top):
    rename(top, ("a", "t"), ("t", "a/a"))


def out_of_itself(top):
    rename(top, ("a/a", "t"))
    os.rmdir(os.path.join(top, "a"))
    rename(top, ("t", "a"))


def over_a_directory(top):
    """The last file of a directory takes the directory's name, the others are gone."""
    rename(top, ("a/keep", "t"))
    shutil.rmtree(os.path.join(top, "a"))
    rename(top, ("t", "a"))


def below_a_file(top):
    """A file's name becomes a directory, with another file in it."""
    os.unlink(os.path.join(top, "name"))
    rename(top, ("other", "name/other"))


class RenamesTest(Case):
    """A renamed file is renamed in the backups: no byte of it is sent."""

    # scenario: (files before, what is done, number of files that are moved)
    SCENARIOS = {
        "file": (["a"], lambda top: rename(top, ("a", "b")), 1),
        "directory": (["d/1", "d/2", "d/sub/3"], lambda top: rename(top, ("d", "e")), 3),
        "swap": (["a", "b"], lambda top: rename(top, ("a", "t"), ("b", "a"), ("t", "b")), 2),
        "directories": (["d/1", "d/2", "e/1", "e/3"], lambda top: rename(top, ("d", "t"), ("e", "d"), ("t", "e")), 4),
        "chain": (["a", "b", "c"], lambda top: rename(top, ("c", "d"), ("b", "c"), ("a", "b")), 3),
        "circle": (["a", "b", "c"], lambda top: rename(top, ("a", "t"), ("c", "a"), ("b", "c"), ("t", "b")), 3),
        "onto": (["a", "b"], lambda top: rename(top, ("a", "b")), 1),
        "deeper": (["a"], lambda top: rename(top, ("a", "x/y/z/a")), 1),
        "higher": (["x/y/a"], lambda top: rename(top, ("x/y/a", "a")) or os.removedirs(os.path.join(top, "x/y")), 1),
        "inside": (["a"], into_itself, 1),
        "outside": (["a/a"], out_of_itself, 1),
        "away": (["a", "b"], lambda top: rename(top, ("a", "a.tmp")), 0),
        "linked": (["a"], lambda top: rename(top, ("a2", "b")), 1),
    }

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        files = {name + "/" + file: SIZE for name, (before, _, _) in cls.SCENARIOS.items() for file in before}
        cls.source = c.source("docs", "s", files, exclude=["*.tmp"])
        os.link(os.path.join(cls.source, "linked/a"), os.path.join(cls.source, "linked/a2"))
        make_tree(cls.source, {"stay%d" % number: 10 for number in range(len(files))})
        c.backup("b1", "a", "9M")
        c.backup("b2", "b", "9M")
        c.start()
        c.settle()
        cls.lost = read_file(os.path.join(cls.source, "onto/b"))
        for name, (_, change, _) in cls.SCENARIOS.items():
            change(os.path.join(cls.source, name))
        cls.results = [c.client(host) for host in "ab"]
        cls.again = [c.client(host) for host in "ab"]

    def test_no_data_crosses_the_wire_and_the_moved_files_are_counted(self):
        for result in self.results:
            self.assertRc(0, result)
            figures = result.json
            self.assertEqual(0, figures["wire_bytes"])
            self.assertEqual(0, figures["copied_files"] + figures["updated_files"] + figures["failed_files"])
            self.assertEqual(sum(moved for _, _, moved in self.SCENARIOS.values()), figures["moved_files"])

    def test_every_file_is_at_its_new_place_and_at_no_other(self):
        for backup in self.c.backups.values():
            expected = {name: entry for name, entry in tree(self.source).items() if not name.endswith(".tmp")}
            kept = os.path.join(backup.path, "docs")
            self.assertEqual([], differences(expected, kept, ignore=("dir.mtime_ns", "dir.mode")))

    def test_what_was_renamed_onto_or_away_is_in_the_attic(self):
        for backup in self.c.backups:
            self.assertEqual(2, len(self.c.attic(backup, "docs")))
            self.assertIn(self.lost, [content for _, content in self.c.attic(backup, "docs")])

    def test_the_next_pass_has_nothing_to_do(self):
        self.assertEqual([True, True], [result.json["settled"] for result in self.again])


class HarderRenamesTest(Case):
    """Renames together with other changes."""

    def changed(self, files, change):
        """The figures of the first pass after the change; checks that two passes bring everything in order."""
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", files)
        make_tree(source, {"stay%d" % number: 10 for number in range(5)})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        change(source)
        first = cluster.client("a")
        self.assertRc(0, first)
        self.assertTrue(cluster.client("a").json["settled"])
        self.assertSameTree(source, cluster.kept_as("b1", "docs"), ignore=("dir.mtime_ns", "dir.mode"))
        return first.json

    def test_a_file_takes_the_name_of_the_directory_that_it_was_in(self):
        figures = self.changed({"a/keep": SIZE, "a/1": SIZE, "a/sub/2": SIZE}, over_a_directory)
        self.assertEqual((1, 0), (figures["moved_files"], figures["wire_bytes"]))

    def test_a_file_goes_below_the_name_of_a_deleted_one(self):
        figures = self.changed({"name": SIZE, "other": SIZE}, below_a_file)
        self.assertEqual((1, 0), (figures["moved_files"], figures["wire_bytes"]))

    def test_a_copy_that_somebody_deleted_is_not_counted_under_its_new_name(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"gone": SIZE, "onto": SIZE, "old": SIZE, "stay": 10})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        for name in ("gone", "onto"):
            os.unlink(cluster.kept_as("b1", "docs", name))
        rename(source, ("gone", "new"), ("onto", "old"))
        cluster.client("a", CBACKUP_TEST_KILL="claimed")
        self.assertEqual([], violations(cluster, settled=False))
        cluster.settle()
        self.assertEqual([], violations(cluster))

    def test_a_new_mode_arrives_together_with_the_new_name(self):
        def change(source):
            os.chmod(os.path.join(source, "a"), 0o741)
            rename(source, ("a", "b"))
        figures = self.changed({"a": SIZE}, change)
        self.assertEqual((1, 0), (figures["moved_files"], figures["wire_bytes"]))

    def test_a_file_that_was_renamed_and_changed_arrives_and_the_others_cost_nothing(self):
        def change(source):
            rename(source, ("d", "e"))
            write_file(os.path.join(source, "e/1"), some_bytes(SIZE, "changed"))
        figures = self.changed({"d/%d" % number: SIZE for number in range(4)}, change)
        self.assertEqual(3, figures["moved_files"])
        self.assertEqual(1, figures["copied_files"] + figures["updated_files"])
        self.assertLess(figures["wire_bytes"], 2 * SIZE)


class KindsTest(Case):
    """A path that becomes another kind of thing becomes it in the backups."""

    KINDS = {"file": b"a file", "changed": b"another file", "directory": DIRECTORY, "link": Link("elsewhere")}

    @classmethod
    def make(cls, path, kind):
        if kind in ("file", "changed"):
            write_file(path, cls.KINDS[kind])
        elif kind == "directory":
            make_tree(path, {"below": b"in a directory", "deep/er": b"deeper", "deep/link": Link("er"), "void": DIRECTORY})
        elif kind == "empty":
            os.mkdir(path)
        else:
            os.symlink({"link": "nowhere", "up": "..", "to directory": "../stay"}[kind], path)

    @staticmethod
    def clear(path):
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

    def test_every_kind_becomes_every_other_and_back(self):
        cluster = self.cluster("s", "a", replicas=1)
        kinds = ["file", "directory", "empty", "link", "up", "to directory"]
        pairs = [(old, new) for old in kinds for new in kinds if old != new]
        source = cluster.source("docs", "s", {"stay/%d" % number: 10 for number in range(70)})
        kept = cluster.backup("b1", "a", "9M")
        os.mkdir(os.path.join(source, "all"))
        for old, new in pairs:
            self.make(os.path.join(source, "all", old + " " + new), old)
        cluster.start()
        cluster.settle()
        for turn in (1, 0):
            for pair in pairs:
                path = os.path.join(source, "all", " ".join(pair))
                self.clear(path)
                self.make(path, pair[turn])
            for _ in range(2):
                last = cluster.client("a")
                self.assertRc(0, last)
            self.assertTrue(last.json["settled"])
            self.assertSameTree(source, os.path.join(kept, "docs"), ignore=("dir.mtime_ns", "dir.mode", "link.mtime_ns"))


class PlantedLinksTest(Case):
    """Nothing is ever written through a symlink that lies in a backup."""

    def test_symlinks_in_a_backup_lead_nowhere(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"sub/f": b"1", "sub/g": b"1", "file": b"1", "deep/er/f": b"1", "gone/f": b"1"})
        kept = os.path.join(cluster.backup("b1", "a", "9M"), "docs")
        cluster.start()
        cluster.settle()
        outside = cluster.path("outside")
        make_tree(outside, {"f": b"precious", "g": b"precious", "er/f": b"precious", "docs/f": b"precious", "file": b"precious"})
        before = tree(outside)
        for name in ("sub", "deep", "gone"):
            shutil.rmtree(os.path.join(kept, name))
            os.symlink(outside, os.path.join(kept, name))
        os.unlink(os.path.join(kept, "file"))
        os.symlink(os.path.join(outside, "file"), os.path.join(kept, "file"))
        meta = os.path.join(cluster.backups["b1"].path, ".cbackup")
        for name in ("incoming", "attic", "bad", "moving"):
            shutil.rmtree(os.path.join(meta, name), ignore_errors=True)
        for name in ("incoming/docs", "attic/docs", "bad/docs"):
            os.makedirs(os.path.join(meta, os.path.dirname(name)))
            os.symlink(outside, os.path.join(meta, name))
        for name in ("sub/f", "file", "deep/er/f"):
            write_file(os.path.join(source, name), "2")
        write_file(os.path.join(source, "sub/new"), "2")
        os.unlink(os.path.join(source, "gone/f"))
        os.rename(os.path.join(source, "sub/g"), os.path.join(source, "sub/h"))
        for arguments in (["client"], ["client"], ["verify"], ["client"]):
            cluster.run("a", *arguments)
            self.assertSameTree(before, outside)
        cluster.settle()
        self.assertSameTree(before, outside)
        self.assertCopies(cluster, "docs", 1)


class MetadataTest(Case):
    """Modes and times arrive without data; the copy stays the same file."""

    def test_a_new_mode_arrives_and_nothing_else_moves(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": SIZE, "d/g": SIZE})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        inode = os.stat(cluster.kept_as("b1", "docs", "f")).st_ino
        os.chmod(os.path.join(source, "f"), 0o741)
        os.chmod(os.path.join(source, "d"), 0o750)
        figures = cluster.client("a").json
        self.assertEqual((0, 0, 0), (figures["wire_bytes"], figures["copied_files"], figures["updated_files"]))
        info = os.stat(cluster.kept_as("b1", "docs", "f"))
        self.assertEqual((0o100741, inode), (info.st_mode, info.st_ino))
        self.assertEqual(0o40750, os.stat(cluster.kept_as("b1", "docs", "d")).st_mode)
        self.assertEqual([], cluster.attic("b1", "docs"))
        self.assertTrue(cluster.client("a").json["settled"])

    def test_a_new_time_alone_sends_next_to_nothing(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": 10 * SIZE})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        os.utime(os.path.join(source, "f"), ns=(7, 1234567890123456789))
        figures = cluster.client("a").json
        self.assertLess(figures["wire_bytes"], SIZE)
        self.assertEqual(1234567890123456789, os.stat(cluster.kept_as("b1", "docs", "f")).st_mtime_ns)
        self.assertTrue(cluster.client("a").json["settled"])


class OldVersionsTest(Case):
    """The attic: plain files, for as long as `keep` says or the room lasts; restore goes back in time with it."""

    HOUR, DAY = 3600, 86400

    def test_old_versions_come_back_until_keep_is_over(self):
        cluster = self.cluster("s", "a", replicas=1, keep="30d")
        source = cluster.source("docs", "s", {"f": b"version 1", "deleted": b"last words", "moved": b"moved", "stay": b"stay"})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        first = tree(source)
        cluster.advance(2 * self.DAY)
        write_file(os.path.join(source, "f"), "version 2")
        os.unlink(os.path.join(source, "deleted"))
        os.rename(os.path.join(source, "moved"), os.path.join(source, "moved on"))
        cluster.settle()
        second = tree(source)
        cluster.advance(2 * self.DAY)
        write_file(os.path.join(source, "f"), "version 3")
        cluster.settle()
        self.assertEqual([b"last words", b"version 1", b"version 2"],
                         sorted(content for _, content in cluster.attic("b1", "docs")))
        for at, expected in (("3d", first), ("1d", second)):
            target = cluster.path("restored " + at)
            self.assertRc(0, cluster.restore("a", "docs", to=target, options=["--at", at]))
            self.assertSameTree(expected, target, ignore=("dir.mtime_ns", "dir.mode"))
        cluster.advance(27 * self.DAY)      # 29 days after the first of them went to the attic
        cluster.client("a")
        self.assertEqual(3, len(cluster.attic("b1", "docs")))
        cluster.advance(2 * self.DAY)
        cluster.client("a")
        self.assertEqual([b"version 2"], [content for _, content in cluster.attic("b1", "docs")])
        cluster.advance(2 * self.DAY)
        cluster.client("a")
        self.assertEqual([], cluster.attic("b1", "docs"))
        self.assertEqual({}, regular_files(cluster.backups["b1"].path, ".cbackup/attic"))
        self.assertEqual(first["stay"], tree(cluster.kept_as("b1", "docs"))["stay"])

    def test_the_oldest_version_gives_way_when_the_room_is_needed(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f%d" % number: 100000 for number in range(3)})
        cluster.backup("b1", "a", "600000")
        cluster.start()
        cluster.settle()
        for number in (1, 0, 2):
            cluster.advance(self.HOUR)
            os.unlink(os.path.join(source, "f%d" % number))
            write_file(os.path.join(source, "g%d" % number), some_bytes(100000, "g%d" % number))
            cluster.settle()
        self.assertEqual(3, len(cluster.attic("b1", "docs")))
        make_tree(source, {"new": 150000})
        result = cluster.client("a")
        self.assertRc(0, result)
        self.assertOneError(result, "b1: 2 old versions", "deleted before their time: their room was needed")
        self.assertEqual([some_bytes(100000, "f2")], [content for _, content in cluster.attic("b1", "docs")])
        self.assertCopies(cluster, "docs", 1)
        self.assertWithinSize(cluster)
        self.assertSilent(cluster.run("a", "client"))

    def test_no_old_version_is_deleted_for_a_file_for_which_there_is_no_room_even_so(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"old": 200000, "growing": 100000, "stay": 10})
        cluster.backup("b1", "a", "600000")
        cluster.start()
        cluster.settle()
        os.unlink(os.path.join(source, "old"))
        cluster.settle()
        old = [content for _, content in cluster.attic("b1", "docs")]
        self.assertEqual([some_bytes(200000, "old")], old)
        write_file(os.path.join(source, "growing"), some_bytes(700000, "grown"))
        make_tree(source, {"new": 800000, "little": 1000})
        result = cluster.client("a")
        self.assertNotIn("before", result.stderr)
        self.assertIn(old[0], [content for _, content in cluster.attic("b1", "docs")])
        self.assertTrue(os.path.exists(cluster.kept_as("b1", "docs", "little")), "what fits is copied")
        self.assertWithinSize(cluster)


if __name__ == "__main__":
    unittest.main()
