"""Restore from disks that are simply there: without any server, and from disks that somebody else has written to."""

import contextlib
import gzip
import io
import os
import unittest
import zlib
from unittest import mock

import cbackup
from tests.disks import WHEN, DiskCase, catalog_bytes, row
from tests.harness import DIRECTORY, FIFO, Link, inodes, make_tree, read_file, some_bytes, tree, wait_for, write_file


class WithoutAnyServerTest(DiskCase):
    """A backup's directory alone is enough: no key, no configuration, no network, no database."""

    def test_a_disk_alone_gives_back_what_it_has(self):
        self.disk([row("", "d"), row("a", content="1"), row("d", "d", mode=0o750), row("d/b", content="2"),
                   row("l", "l", "d/b"),
                   row("void", "d")], {"a": "1", "d/b": "2"})
        result = self.restored(os.path.join(self.base, "disk"))
        self.assertEqual({"a", "d", "d/b", "l", "void"}, self.back())
        self.assertEqual("", result.stderr)
        self.assertFalse(os.path.exists(os.path.join(self.base, "no home")), "a home was made")

    def test_two_disks_together_give_what_neither_has_alone(self):
        rows = [row("f%d" % number, content="%d" % number) for number in range(20)]
        first = self.disk(rows, {"f%d" % number: "%d" % number for number in range(0, 20, 2)}, "first")
        second = self.disk(rows, {"f%d" % number: "%d" % number for number in range(1, 20, 2)}, "second")
        result = self.restored(first, rc=1)
        for number in range(20):
            lines = [line for line in result.error_lines if "f%d:" % number in line]
            self.assertEqual(number % 2, len(lines), str(result))
        self.restored(first, second)
        self.assertEqual({"f%d" % number for number in range(20)}, self.back())

    def test_the_newest_of_the_disks_catalogs_counts(self):
        old = self.disk([row("a", content="old"), row("gone", content="x")], {"a": "old", "gone": "x"}, "old")
        new = self.disk([row("a", content="new")], {"a": "new"}, "new", catalog="000000000000-000000000002-%d.gz" % (WHEN + 9))
        self.restored(old, new)
        self.assertEqual({"a"}, self.back())
        self.assertEqual(b"new", read_file(os.path.join(self.to, "a")))

    def test_a_directory_that_is_no_backup_is_an_error_that_names_it(self):
        os.mkdir(os.path.join(self.base, "plain"))
        for path in ("plain", "not there"):
            result = self.restored(os.path.join(self.base, path), rc=2)
            self.assertOneError(result, os.path.join(self.base, path))
        self.assertFalse(os.path.lexists(self.to))

    def test_a_disk_that_has_nothing_of_the_source_is_said_so(self):
        self.assertOneError(self.restored(self.disk([], source="other"), rc=1), "docs")

    def test_a_damaged_copy_is_not_restored_and_a_second_disk_makes_up_for_it(self):
        rows = [row("a", content="right"), row("b", content="1")]
        bad = self.disk(rows, {"a": "wrong", "b": "1"}, "bad")
        result = self.restored(bad, rc=1)
        self.assertEqual(["the copy of a is damaged; taking another", "a: its last known holders"], [
            word for line in result.error_lines for word in ("the copy of a is damaged; taking another", "a: its last known holders")
            if word in line])
        self.assertEqual({"b"}, self.back())
        self.restored(bad, self.disk(rows, {"a": "right"}, "good"))
        self.assertEqual(b"right", read_file(os.path.join(self.to, "a")))

    def test_a_cut_off_catalog_is_said_and_an_older_one_is_taken(self):
        disk = self.disk([row("a", content="1")], {"a": "1"})
        whole = gzip.compress(catalog_bytes([row("b")] * 2000))
        self.disk([], packed=whole[:-40], catalog="000000000001-000000000002-%d.gz" % (WHEN + 9))
        result = self.restored(disk)
        self.assertOneError(result, "damaged", "000000000001-000000000002")
        self.assertEqual({"a"}, self.back())



class OddTargetTest(DiskCase):

    def test_a_file_system_that_does_not_know_how_large_it_is_is_not_full(self):
        # tmpfs with size=0, ramfs, some of FUSE and of networks
        disk = self.disk([row("", "d"), row("f", content="text")], {"f": b"text"})
        info = list(os.statvfs(self.base))
        info[2:5] = 0, 0, 0
        with mock.patch.object(os, "statvfs", lambda path: os.statvfs_result(info)), \
                contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(0, cbackup.main(self.words([disk])))
        self.assertEqual(b"text", read_file(os.path.join(self.to, "f")))


class HostileDiskTest(DiskCase):
    """Whatever a disk says, nothing is written outside the target, and what is wrong is said in one clear line."""

    def setUp(self):
        super().setUp()
        self.outside = os.path.join(self.base, "outer", "outside")
        make_tree(self.outside, {"victim": "precious", "dir/other": "precious", "empty": DIRECTORY})
        self.before = self.look()

    def look(self):
        """All that is not the target and not the disks."""
        return (inodes(self.outside), tree(self.outside), os.stat(self.outside).st_mode,
                sorted(set(os.listdir(self.base))), sorted(set(os.listdir(os.path.dirname(self.to))) - {"target"}))

    def refused(self, rows, files=(), rc=1, **more):
        """Restores from such a disk, twice: the second run finds what the first has left. Returns the first Result."""
        disk = self.disk(rows, files)
        before = self.look()
        options = more.pop("options", ())
        first = self.restored(disk, rc=rc, options=options, **more)
        for again in (options, ["--force"]):
            self.attempt(disk, options=again, **more)
        self.assertEqual(before, self.look())
        return first

    def test_names_that_lead_out(self):
        for name in self.todays((
                "../outside/victim", "a/../../outside/victim", self.outside + "/victim", "/etc/cbackup-test", "a//b", "./a",
                "a/.", "a/..", "..", ".", "/", "", "a\0b", "x/" * 5000 + "x", "\ud800", "\udc41"), 3):
            with self.subTest(name=name[:50]):
                result = self.refused([row("good", content="1"), row(name, content="2")], {"good": "1"})
                self.assertTrue(result.error_lines, str(result))

    def test_symlinks_and_directories_that_lead_out(self):
        for name in self.todays(("../link", self.outside + "/new", "a/../../new", ""), 2):
            with self.subTest(name=name):
                self.refused([row(name, "l", self.outside)])
        for name in ("../outside/new", "../new", "a/../../new"):
            with self.subTest(name=name):
                self.refused([row(name, "d")])

    def test_a_file_below_a_symlink_of_the_same_catalog(self):
        rows = [row("a", "l", self.outside), row("a/victim", content="mine"), row("a/new", content="mine"),
                row("a/dir", "d", mode=0o777), row("a/empty", "l", "/etc")]
        copies = {"a/victim": "mine", "a/new": "mine"}
        for turned in (rows, rows[::-1]):
            result = self.refused(turned, copies)
            self.assertTrue(result.error_lines, str(result))
            for line in result.error_lines:
                self.assertRegex(line, r"\Acbackup: a(/\w+)?: (something else is there|Not a directory)\Z")

    def test_the_root_as_a_symlink_or_a_file(self):
        for line in (row("", "l", self.outside), row("", "f", "x"), [""]):
            self.refused([line, row("victim", content="mine")], {"victim": "mine"})

    def test_a_file_and_a_directory_of_the_same_name(self):
        rows = [row("a", content="file"), row("a", "d"), row("a/b", content="1"), row("c", content="1")]
        for turned in (rows, rows[::-1]):
            disk = self.disk(turned, {"a/b": "1", "c": "1"})
            self.attempt(disk)
            self.assertEqual(b"1", read_file(os.path.join(self.to, "c")), "a bad line costs other files")
            self.assertEqual(self.before[:3], self.look()[:3])

    def test_duplicate_lines(self):
        disk = self.disk([row("a", content="old"), row("a", content="1"), row("a", content="1"), row("l", "l", "x"),
                          row("l", "l", "y"), row("d", "d"), row("d", "d", mode=0o700)], {"a": "1"})
        self.restored(disk)
        self.assertEqual((b"1", "y"), (read_file(self.to + "/a"), os.readlink(self.to + "/l")))

    def test_what_belongs_to_the_restore_itself_is_not_taken_from_a_catalog(self):
        work = ".cbackup-restore"
        rows = [row("good", content="1"), row("victim", content="mine"), row("lost", content="never there"),
                row(work + "/x", content="1")]
        rows += [row("%s/files-%d" % (work, number), "l", self.outside) for number in range(3)]
        rows += [row("%s/%s" % (work, name), "l", self.outside + "/new-" + name)
                 for name in ("plan.db", "done.db", "lock", "whole", "catalog-0", "done.db-wal", "done.db-shm")]
        # The first run finds no file, and would lay the links; the second has something to write.
        self.refused(rows)
        self.refused(rows, {"good": "1", "victim": "mine", work + "/x": "1"})
        self.assertLessEqual({"good", "victim"}, self.back())

    def test_a_work_directory_that_somebody_prepared(self):
        for name in self.todays(("files-0", "lock", "done.db", "plan.db", "whole", "files-0/victim", ""), 3):
            with self.subTest(name=name):
                self.to = os.path.join(self.base, "outer", "target " + os.path.basename(name))
                target = self.outside if name in ("files-0", "") else self.outside + ("/victim" if "/" in name else "/new")
                make_tree(self.to, {os.path.normpath(".cbackup-restore/" + name): Link(target)})
                self.attempt(self.disk([row("victim", content="mine")], {"victim": "mine"}))
                self.assertEqual(self.before[:3], self.look()[:3])

    def test_link_groups_that_point_at_nothing(self):
        disk = self.disk([row("a", content="1", link=7), row("b", content="1", link=7), row("c", content="2", link=7),
                          row("d", content="2", link=8), row("e", content="3", link=-1), row("l", "l", "a", link=7),
                          row("dir", "d", link=7), row("same", content="1", link=7)],
                         {"b": "1", "c": "2", "d": "2", "e": "3", "same": "1"})
        self.attempt(disk)
        for name, content in {"a": b"1", "b": b"1", "c": b"2", "d": b"2", "e": b"3", "same": b"1"}.items():
            with self.subTest(name=name):
                self.assertEqual(content, read_file(os.path.join(self.to, name)))

    def test_absurd_values(self):
        for number, bad in self.todays(enumerate((
                row("bad", size=2 ** 63 - 1, content="1"), row("bad", size=2 ** 70), row("bad", size=-1),
                row("bad", mtime=2 ** 63 - 1),
                row("bad", mtime=-2 ** 63), row("bad", mtime=2 ** 70), row("bad", mtime=-2 ** 70), row("bad", uid=2 ** 33),
                row("bad", uid=-1, gid=-1), row("bad", gid=2 ** 70), row("bad", uid=-5), row("bad", mode=-1),
                row("bad", mode=0o170777),
                row("bad", mode=2 ** 70), row("bad", user="a\0b"), row("bad", user="\ud800"), row("bad", group="x" * 100000),
                row("bad", link=2 ** 70), row("bad", extra="zz"), row("bad", extra="00"), row("bad", extra=7),
                row("bad", "l", "a\0b"), row("bad", "l", ""), row("bad", "l", "x" * 100000), row("bad", "l", mtime=2 ** 70),
                row("bad", "l", mtime=2 ** 63 - 1), row("bad", "d", mtime=2 ** 63 - 1), row("bad", "d", mtime=-2 ** 63),
                row("bad", "d", uid=2 ** 33), row("bad", "l", uid=2 ** 33), row("bad", "p"), row("bad", None), row("bad", 7),
                row("bad", holders=["\ud800\n\033[2J"]), row("x" * 300), row("y/" * 1500 + "y"), row("bad", size=1.5),
                row("bad", size=True), row("bad", extra=None, size=0), [], [1], ["bad"] * 12, "bad", 7, None, [["bad"]],
                {"end": 5}, {}, b"{", b"\xff\xfe", b"[" * 100000, b"\"", b"1" * 5000, b"[NaN]", b"")), 9):
            with self.subTest(number=number, line=str(bad)[:60]):
                # By turns: none of the lines may hurt, whatever becomes of it, and none may crash.
                copies = {"good": "1", "bad": "1"} if isinstance(bad, list) and number else {"good": "1"}
                self.attempt(self.disk([row("good", content="1"), bad], copies, "disk%d" % number))
                self.assertEqual(self.before[0], inodes(self.outside))

    def test_one_path_that_this_file_system_cannot_have_costs_no_other(self):
        for bad in (row("x" * 300, content="1"), row("y" * 300 + "/f", content="1"), row("z" * 256, "d"),
                    row("w" * 256, "l", "x")):
            with self.subTest(line=str(bad)[:20]):
                result = self.restored(self.disk([row("good", content="1"), bad, row("v", "d"), row("k", "l", "good")],
                                                 {"good": "1"}), rc=1)
                self.assertLessEqual({"good", "v", "k"}, self.back(), str(result))
                self.assertIn(bad[0][:100], result.stderr)
                self.assertIn("File name too long", result.stderr)

    def test_times_and_owners_that_this_file_system_cannot_have_cost_no_file(self):
        self.restored(self.disk([row("a", content="1", mtime=2 ** 63 - 1), row("b", content="1", uid=2 ** 32 - 2),
                                 row("c", content="1", mtime=-2 ** 63), row("d", "d", mtime=2 ** 63 - 1),
                                 row("l", "l", "x", mtime=2 ** 63 - 1)], {"a": "1", "b": "1", "c": "1"}))
        self.assertEqual({"a", "b", "c", "d", "l"}, self.back())

    def test_names_of_catalogs_that_run_in_circles(self):
        for number, names in enumerate((["000000000005-000000000005-1.gz"], ["000000000009-000000000003-1.gz"],
                                        ["000000000000-000000000005-%s.gz" % ("9" * 30)],
                                        ["000000000005-000000000003-1.gz", "000000000003-000000000005-1.gz"])):
            with self.subTest(names=names):
                for name in names:
                    disk = self.disk([row("a")], name="disk%d" % number, catalog=name)
                self.restored(disk, rc=1, timeout=5)

    def test_catalogs_that_are_no_gzip_files_or_damaged_or_cut_off(self):
        good = gzip.compress(catalog_bytes([row("f%d" % number, content="1") for number in range(200)]))
        flipped = good[:len(good) // 2] + bytes([good[len(good) // 2] ^ 255]) + good[len(good) // 2 + 1:]
        for packed in (b"", b"no gzip", good[:-1], good[:20], good[:len(good) // 2], flipped, good[:-8] + b"\0" * 8,
                       good + b"junk",
                       gzip.compress(b""), gzip.compress(catalog_bytes([row("a")], end=0)),
                       gzip.compress(catalog_bytes([row("a")], end="1"))):
            with self.subTest(size=len(packed)):
                disk = self.disk([], packed=packed)
                result = self.attempt(disk)
                self.assertRc(1, result)

    def test_a_catalog_that_unfolds_into_gigabytes(self):
        packer = zlib.compressobj(1, wbits=31)
        packed = packer.compress(b"[\"") + packer.compress(b"x" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
        block = packer.compress(b"x" * (8 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
        disk = self.disk([], packed=packed + block * 250)
        self.restored(disk, rc=1, memory=1 << 30, timeout=10)

    def test_catalogs_that_are_fifos_directories_or_symlinks(self):
        for number, thing in enumerate((FIFO, DIRECTORY, Link("/dev/zero"), Link("nowhere"))):
            with self.subTest(thing=number):
                disk = self.disk([row("a", content="1")], {"a": "1"}, "disk%d" % number)
                name = "000000000000-000000000002-%d.gz" % WHEN
                make_tree(os.path.join(disk, ".cbackup", "catalog", "docs"), {name: thing})
                # The other catalog of this disk would do, but it is another one's word against what is damaged.
                result = self.attempt(disk, timeout=5)
                self.assertIn(name, result.stderr)

    def test_copies_that_are_fifos_directories_symlinks_or_of_another_size(self):
        rows = [row("good", content="1")] + [row(name, content="1" * 9) for name in ("fifo", "dir", "link", "out/victim",
                                                                                     "long", "short")]
        write_file(os.path.join(self.outside, "victim"), "1" * 9)
        disk = self.disk(rows, {"good": "1", "fifo": FIFO, "dir/x": "1", "link": Link(self.outside + "/victim"),
                                "out": Link(self.outside), "long": "1" * 99, "short": "1"})
        with open(os.path.join(disk, "docs", "long"), "r+b") as file:
            file.truncate(1 << 40)
        result = self.restored(disk, rc=1)
        self.assertEqual({"good"}, self.back())
        for name in ("fifo", "dir", "link", "out/victim", "long", "short"):
            self.assertEqual(1, sum(" %s:" % name in line for line in result.error_lines), str(result))


def bytes_below(root):
    """The sum of the sizes of the files below a directory that another process is writing to."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


class InterruptedCopyTest(DiskCase):
    """A large file that comes from a disk is continued where it was interrupted, and never left half at its place."""

    def test_killed_in_the_middle_of_a_large_file(self):
        content = some_bytes(1 << 20, 1) * 40
        disk = self.disk([row("large", content=content)], {"large": content})
        process = self.spawn(disk)
        wait_for(lambda: not process.running or bytes_below(self.to) > 4 << 20, 20, "it never began")
        process.kill()
        self.assertEqual(set(), self.back())
        self.restored(disk)
        self.assertEqual(content, read_file(os.path.join(self.to, "large")))
        self.assertFalse(os.path.lexists(os.path.join(self.to, ".cbackup-restore")))


if __name__ == "__main__":
    unittest.main()
