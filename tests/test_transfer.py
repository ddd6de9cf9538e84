"""What is copied arrives as it was: names, bytes, modes, times; and little is sent when little changed."""

import contextlib
import os
import socket
import stat
import unittest

from tests.harness import (DIRECTORY, FIFO, Case, Link, Process, differences, make_tree, one_in, plain_environment, read_file,
                           some_bytes, tree, wait_for, write_file)

ODD_NAMES = [b"new\nline", b"\n", b"carriage\rreturn", b"trailing blank ", b" leading blank", b"two  blanks", b"tab\t",
             b"not utf-8 \xff\xfe", b"\x80", b"latin-1 \xe4", "gr\u00fc\u00dfe".encode(), "\U0001f600".encode(),
             b"-leading-dash", b"--delete", b"-", b"[bracket]", b"[", b"star*", b"*", b"question?", b"back\\slash",
             b"\\", b"trailing\\", b"#hash", b";semicolon", b"%NAME%", b"%", b"$HOME", b"`id`", b"$(id)", b"!", b"~",
             b"~root", b"a'b", b'a"b', b"{a,b}", b"a|b", b"a&b", b"a:b", b"host::module", b"...", b"..a", b".hidden",
             b".x.AbCdEf", b"docs", b".cbackup", b".rsync-filter", b"CON", b"\x01\x02", b"\x7f", b"n" * 255]


class OddNamesTest(Case):
    """Whatever name a file has at the source, it has in each backup and after a restore."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        # The source's own path is odd as well, in each way that a daemon's configuration could trip over.
        odd = cls.c.path("s", "a\nb", "100%USER% [x] \\ #; ")
        os.makedirs(odd)
        os.symlink("a\nb", cls.c.path("s", "link"))
        cls.names = []
        for name in ODD_NAMES:
            # Not every file system takes every name; those that it takes must work.
            with contextlib.suppress(OSError):
                write_file(os.path.join(os.fsencode(odd), name), b"file " + name)
                cls.names.append(os.fsdecode(name))
                directory = os.path.join(os.fsencode(odd), b"in directories", name)
                os.makedirs(directory)
                write_file(os.path.join(directory, name), b"inner " + name)
                os.symlink(name, os.path.join(directory, b"link"))
        deep = os.path.join(*["deep directory %02d" % number for number in range(40)])
        make_tree(odd, {os.path.join(deep, "file"): b"deep", "to be\ndeleted ": b"x"})
        cls.source = cls.c.source("docs", "s", path=cls.c.path("s", "link", os.path.basename(odd)))
        cls.c.backup("b1", "a", "10M", path=cls.c.path("a", "backup with %USER% [and] #; blanks"))
        cls.c.backup("b2", "b", "10M")
        cls.c.start()
        cls.c.round()
        cls.kept = {backup: cls.c.kept(backup) for backup in ("b1", "b2")}
        cls.files = {name for name, entry in tree(cls.source).items() if entry.kind == "file"}

    def test_most_names_could_be_made(self):
        self.assertGreater(len(self.names), 40)

    def test_every_file_is_in_both_backups_under_its_own_name(self):
        for name in self.names:
            for relative in (name, os.path.join("in directories", name, name)):
                for backup in ("b1", "b2"):
                    with self.subTest(name=relative[:60], backup=backup):
                        self.assertEqual(read_file(os.path.join(self.source, relative)),
                                         read_file(self.c.kept_as(backup, "docs", relative)))
        self.assertCopies(self.c, "docs", 2)

    def test_a_backup_holds_nothing_else(self):
        for found in self.kept.values():
            self.assertEqual(self.files, {os.path.relpath(name, "docs") for name, info in found.items()
                                          if stat.S_ISREG(info.st_mode)})

    def test_all_come_back(self):
        to = self.c.path("restored")
        self.assertRc(0, self.c.restore("a", "docs", to=to))
        self.assertSameTree(self.source, to)

    def test_each_can_be_asked_for_by_its_name(self):
        names, to = self.names[::8], self.c.path("by name")     # none of which is a pattern for another
        self.assertRc(0, self.c.restore("a", "docs", "--", *names, to=to))
        self.assertEqual(set(names), set(os.listdir(to)))
        for name in names:
            self.assertEqual(read_file(os.path.join(self.source, name)), read_file(os.path.join(to, name)), name)

    def test_changes_arrive_under_odd_names_too(self):
        for name in self.names:
            write_file(os.path.join(self.source, name), "changed")
        os.unlink(os.path.join(self.source, "to be\ndeleted "))
        self.c.round()
        self.assertCopies(self.c, "docs", 2)
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "docs", "to be\ndeleted ")))


MODES = [0o644, 0o600, 0o400, 0o444, 0o755, 0o700, 0o777, 0o666, 0o640, 0o755 | stat.S_ISVTX]
if os.geteuid() == 0:
    MODES += [0, 0o111, 0o200]      # nobody but root can read them

TIMES = [0, 1, 10 ** 9, 1234567890123456789, 10 ** 18 + 1, 999999999, (2 ** 31 - 1) * 10 ** 9 + 999999999,
         2 ** 32 * 10 ** 9 + 1, -10 ** 9 * 86400 * 365]

LINKS = {"to file": "target", "to dir": "dir", "dangling": "nowhere at all", "absolute": "/etc/passwd",
         "up": "../../../..", "loop": "loop", "odd": b" odd \xff\n", "long": "x/" * 500 + "y", "dot": "."}

DEEP = "/".join(["d" * 200] * 14)


class AttributesTest(Case):
    """Modes, modification times to the nanosecond, empty files, links and empty directories come back as they were. All are
    backed up and restored together, changed, and backed up again; each test looks at a directory of its own."""

    STORIES = {
        "modes": {"%o" % mode: b"x" for mode in MODES},
        "long": {"f": b"1", **{"%s/f%d" % (DEEP, n): b"%d" % n for n in range(3)}},
        "closed": {"closed/inner/f": b"1", "closed/g": b"2", "void": DIRECTORY},
        "times": dict({str(number): b"x" for number in range(len(TIMES))}, dir=DIRECTORY, link=Link("0")),
        "links": dict({"link " + name: Link(target) for name, target in LINKS.items()}, **{"target": b"x", "dir/f": b"y"}),
        "outside": {"link": Link("../../../outside"), "f": b"1"},
        "empties": {"e1": b"", "e2": b"", "d1": DIRECTORY, "d2/d3/d4": DIRECTORY, "d5/e": b""},
        "same": {"one": b"the same" * 100, "two": b"the same" * 100},
        "touched": {"f": some_bytes(200000, 1), "g": some_bytes(200000, 1)},
        "replaced": {"f": b"old contents"},
        "kinds": {"f": b"1", "d/inner": b"2", "l": Link("f"), "x": b"3"}}

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=1)       # b is where it is restored
        cls.source = cls.c.source("docs", "s", {"empty": b"", "void": DIRECTORY, "a/b/void": DIRECTORY, "one": b"1"})
        make_tree(cls.c.path("s", "outside"), {"secret": b"secret"})
        for name, files in cls.STORIES.items():
            make_tree(cls.at(name), files)
        for mode in MODES:
            os.chmod(cls.at("modes", "%o" % mode), mode)
        for name in ("closed/inner", "closed", "void"):
            os.chmod(cls.at("closed", name), 0o555)
        for number, time in enumerate(TIMES):
            os.utime(cls.at("times", str(number)), ns=(time, time))
        os.utime(cls.at("times", "dir"), ns=(5, 1111111111222222222))
        os.utime(cls.at("times", "link"), ns=(5, 1111111111333333333), follow_symlinks=False)
        cls.before = {name: tree(cls.at(name)) for name in cls.STORIES}
        cls.c.backup("b1", "a", "10M")
        cls.c.start("s", "a")
        cls.c.round()
        cls.copies = cls.c.copies_on_disk("docs")
        cls.to = cls.c.path("restored")
        cls.result = cls.c.restore("b", "docs", to=cls.to)
        cls.change()
        cls.figures = cls.c.round()

    @classmethod
    def at(cls, *names):
        return os.path.join(cls.source, *names)

    @classmethod
    def change(cls):
        os.chmod(cls.at("touched/f"), 0o604)
        os.utime(cls.at("touched/g"), ns=(5, 1111111111222222222))
        path = cls.at("replaced/f")
        info = os.stat(path)
        write_file(path + ".new", b"new contents")
        os.utime(path + ".new", ns=(info.st_atime_ns, info.st_mtime_ns))
        os.rename(path + ".new", path)
        for name in ("f", "l", "x", "d/inner"):
            os.unlink(cls.at("kinds", name))
        os.rmdir(cls.at("kinds/d"))
        make_tree(cls.at("kinds"), {"f/inner": b"4", "d": b"5", "l": b"6", "x": Link("d")})

    def assertCameBack(self, name):
        """SOURCE/NAME was copied to the one backup, and restored as it was."""
        files = [os.path.join(name, relative) for relative, entry in self.before[name].items() if entry.kind == "file"]
        self.assertEqual({path: ["b1"] for path in files}, {path: self.copies[path] for path in files})
        self.assertRc(0, self.result)
        self.assertSameTree(self.before[name], os.path.join(self.to, name))

    def assertInBackups(self, name, fields=("mode", "mtime_ns")):
        """The copies of the files below SOURCE/NAME have these attributes, as the contract says."""
        for relative, entry in tree(self.at(name)).items():
            if entry.kind == "file":
                folder, base = os.path.split(self.c.kept_as("b1", "docs", os.path.join(name, relative)))
                copy = tree(folder)[base]
                # Never setuid, setgid or sticky: nothing in a backup runs as somebody else.
                wanted = entry._replace(mode=entry.mode & 0o777)
                for field in fields:
                    self.assertEqual(getattr(wanted, field), getattr(copy, field), (relative, field))

    def test_modes(self):
        self.assertCameBack("modes")
        self.assertInBackups("modes", ["mode"])

    def test_several_files_with_very_long_paths(self):
        """Of which rsync 3.5 says that it has not asked for them when they come together."""
        self.assertCameBack("long")

    def test_directories_that_cannot_be_written(self):
        self.assertCameBack("closed")

    def test_times(self):
        self.assertCameBack("times")
        self.assertInBackups("times")

    def test_symlinks(self):
        self.assertCameBack("links")
        self.assertEqual("/etc/passwd", os.readlink(os.path.join(self.to, "links/link absolute")))
        self.assertTrue(os.path.islink(os.path.join(self.to, "links/link to dir")))

    def test_a_symlink_to_a_directory_is_not_followed(self):
        self.assertEqual(b"secret", read_file(self.at("outside/link/secret")))
        self.assertCameBack("outside")
        self.assertFalse(any(name.endswith("secret") for name in self.c.kept("b1")))

    def test_empty_files_and_empty_directories(self):
        self.assertCameBack("empties")

    def test_identical_files_are_each_kept(self):
        self.assertCameBack("same")

    def test_a_change_of_mode_or_time_alone_arrives_and_sends_no_contents(self):
        self.assertCameBack("touched")
        self.assertInBackups("touched")
        self.assertLess(sum(one["wire_bytes"] for one in self.figures), 100000)

    def test_a_new_inode_with_the_same_size_and_time_is_noticed(self):
        self.assertCameBack("replaced")
        self.assertEqual(b"new contents", read_file(self.c.kept_as("b1", "docs", "replaced/f")))

    def test_a_file_that_became_a_directory_and_the_reverse(self):
        self.assertCameBack("kinds")
        to = self.c.path("restored again")
        self.assertRc(0, self.c.restore("b", "docs", "kinds", to=to))
        self.assertSameTree(self.at("kinds"), os.path.join(to, "kinds"))


class LeftOutTest(Case):
    """What is no file, directory or link is left out and holds nothing up; what cannot be read is named."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        docs = c.source("docs", "s", {"f": b"1", "pipe": FIFO, "d/pipe": FIFO})
        cls.other = c.source("other", "s", {"f": b"1", "g": b"2"})
        c.backup("b1", "a", "1M")
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(docs)          # the names of sockets must be short
            try:
                server.bind("socket")
            finally:
                os.chdir(here)
            c.start()
            c.round()

    def test_fifos_and_sockets_are_left_out(self):
        self.assertEqual({"f": ["b1"]}, self.c.copies_on_disk("docs"))
        self.assertEqual(1, self.c.status()["sources"]["docs"]["files"])
        to = self.c.path("restored")
        self.assertRc(0, self.c.restore("a", "docs", to=to))
        self.assertEqual({"f", "d"}, set(tree(to)))

    def test_a_file_that_became_a_fifo_holds_nothing_up(self):
        os.unlink(os.path.join(self.other, "f"))
        os.mkfifo(os.path.join(self.other, "f"))
        write_file(os.path.join(self.other, "h"), "3")
        self.c.round()
        self.assertEqual({"g": ["b1"], "h": ["b1"]}, self.c.copies_on_disk("other"))
        self.assertFalse(os.path.lexists(self.c.kept_as("b1", "other", "f")))

    @unittest.skipIf(os.geteuid() == 0, "root can read everything")
    def test_a_file_that_cannot_be_read_is_named_and_the_others_are_copied(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": b"1", "private": b"2", "closed/g": b"3", "h": b"4"})
        cluster.backup("b1", "a", "1M")
        os.chmod(os.path.join(source, "private"), 0)
        os.chmod(os.path.join(source, "closed"), 0)
        self.addCleanup(os.chmod, os.path.join(source, "closed"), 0o700)
        cluster.start()
        result = cluster.client("a")
        self.assertRc(1, result)
        for name in ("private", "closed"):
            self.assertIn(name, result.stderr)
        self.assertFalse(result.json["settled"])
        for name in ("f", "h"):
            self.assertEqual(read_file(os.path.join(source, name)), read_file(cluster.kept_as("b1", "docs", name)))


@one_in(2)
class LittleIsSentTest(Case):
    """A large file with a small change costs what the change costs, on both replicas."""

    def test_a_small_change_in_a_large_file_sends_little(self):
        size = 4 << 20
        content = some_bytes(size, "disk")
        cluster = self.cluster("s", "a", "b")
        source = cluster.source("disks", "s", {"disk.img": content})
        cluster.backup("b1", "a", "200M")
        cluster.backup("b2", "b", "200M")
        cluster.start()
        first = cluster.round()
        self.assertEqual((2, 2 * size), (sum(one["copied_files"] for one in first),
                                         sum(one["copied_bytes"] for one in first)))
        sent = sum(one["wire_bytes"] for one in first)
        self.assertTrue(2 * size <= sent < 2 * size * 1.01, sent)
        path = os.path.join(source, "disk.img")
        inodes = [os.stat(cluster.kept_as(backup, "disks", "disk.img")).st_ino for backup in ("b1", "b2")]
        with open(path, "r+b") as file:
            file.seek(3 << 20)
            file.write(some_bytes(100000, "change"))
            file.seek(0, os.SEEK_END)
            file.write(some_bytes(1000, "growth"))
        second = cluster.round()
        self.assertCopies(cluster, "disks", 2)
        self.assertEqual(2, sum(one["updated_files"] for one in second))
        self.assertLess(sum(one["wire_bytes"] for one in second), 2 * 300000)
        for number, backup in enumerate(("b1", "b2")):
            self.assertEqual([content], [old for _, old in cluster.attic(backup, "disks")])
            self.assertNotEqual(inodes[number], os.stat(cluster.kept_as(backup, "disks", "disk.img")).st_ino)

    def test_a_client_that_is_killed_leaves_nothing_that_counts_and_the_next_one_finishes(self):
        cluster = self.cluster("s", "a", replicas=1)
        files = {"big": 4 << 20}
        files.update({"d%d/f%d" % (number % 7, number): number * 10 for number in range(400)})
        cluster.source("docs", "s", files)
        cluster.backup("b1", "a", "50M")
        cluster.start()
        for moment in (0, 1, 100):
            client = cluster.spawn("a", "client")
            wait_for(lambda: len(cluster.kept("b1")) >= moment or not client.running, 30, "nothing arrived")
            client.kill()
            status = cluster.status()["sources"]["docs"]
            on_disk = sum(len(backups) for backups in cluster.copies_on_disk("docs").values())
            self.assertGreaterEqual(on_disk, status["copies"].get("1", 0), "counted, but not there")
        cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        expected = {os.path.join("docs", name) for name in files}
        self.assertEqual(expected, {name for name, info in cluster.kept("b1").items() if stat.S_ISREG(info.st_mode)})


class CopiesWithoutCbackupTest(Case):
    """What lies in the backups is enough: `cp` of two of three gives the source."""

    def test_cp_of_any_two_of_three_backups_is_the_source(self):
        cluster = self.cluster("s", "a", "b", "c")
        files = {"d%d/%d" % (number % 5, number): 500 * number for number in range(30)}
        source = cluster.source("docs", "s", files)
        total = sum(content for content in files.values())
        for host in "abc":
            cluster.backup("b" + host, host, str(total * 3 // 4))
        cluster.start()
        cluster.settle()
        self.assertWithinSize(cluster)
        for pair in ("ab", "bc", "ca"):
            to = cluster.path("cp " + pair)
            os.mkdir(to)
            copies = [cluster.kept_as("b" + host, "docs") + "/." for host in pair]
            self.assertRc(0, Process(["cp", "-pR"] + copies + [to + "/"], plain_environment(cluster.base)).wait(60))
            # cp can keep no more of a time than it knows of, and the directories are cp's own.
            lines = differences(source, to, ["dir.mtime_ns", "dir.mode", "file.mtime_ns"])
            self.assertEqual([], lines)


if __name__ == "__main__":
    unittest.main()
