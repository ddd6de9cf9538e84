"""Copies that rot, are edited, cut, deleted or joined by others: noticed, put right, and what is not ours is left alone."""

import os
import shutil
import subprocess
import unittest

from tests.faults import lose_state, mount_or_skip, regular_files, violations
from tests.harness import Case, make_tree, read_file, some_bytes, write_file
from tests.members import Member


def flip(path, at=None):
    """Another byte in a file, its size, mode and times as before: what a disk does."""
    info = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(info.st_size // 2 if at is None else at)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def untouched(path):
    """Changes when a file is touched at all (but for reading it)."""
    info = os.lstat(path)
    return info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class DecayCase(Case):

    files, keys = {}, {}

    @classmethod
    def setUpClass(cls):
        """One cluster, in which each test has files of its own, and leaves everything well."""
        cls.c = cls.share_cluster("s", "a", "b", **dict({"replicas": 2}, **cls.keys))
        cls.source = cls.c.source("docs", "s", cls.files)
        cls.c.backup("b1", "a", "9M")
        cls.c.backup("b2", "b", "9M")
        cls.c.start()
        cls.c.settle()

    def settle(self, *hosts):
        """Passes of these hosts until they have nothing more to do; then all must hold."""
        self.c.settle(hosts=hosts)
        self.assertEqual([], violations(self.c))

    def counted(self):
        """How many files the server believes to have all their copies."""
        with Member(self.c, "b1", "docs") as member:
            return member.ask("status")["sources"]["docs"]["copies"].get("2", 0)

    def aside(self, backup):
        """The contents of what was set aside below .cbackup, old versions not regarded."""
        root = os.path.join(self.c.backups[backup].path, ".cbackup")
        return [read_file(os.path.join(root, name)) for name in regular_files(root)
                if not name.startswith(("attic/", "catalog/", "backup.db", "incoming/"))
                and name not in ("identity", "lock")]


class VerifyTest(DecayCase):
    """`verify` reads every copy of this host now."""

    LARGE = 400000
    NAMES = ("flipped", "large", "tail", "cut", "grown", "edited", "deleted", "folder/deleted", "link", "dir", "fine")
    files = {"all/" + name: 3000 for name in NAMES}
    files.update({"%s/%s" % (folder, name): 3000 for folder in ("each", "lost", "both lost") for name in "fg"})
    files.update({"some/f%d" % number: 3000 for number in range(4)})
    files.update({"all/large": LARGE, "all/tail": LARGE, "both lost/f": 3 << 20})

    def test_all_that_is_wrong_with_copies_is_noticed_and_put_right(self):
        cluster, names = self.c, self.NAMES
        kept = cluster.kept_as("b1", "docs", "all")
        flip(os.path.join(kept, "flipped"))
        flip(os.path.join(kept, "large"))
        flip(os.path.join(kept, "tail"), self.LARGE - 1)
        os.truncate(os.path.join(kept, "cut"), 100)
        with open(os.path.join(kept, "grown"), "ab") as file:
            file.write(b"more")
        write_file(os.path.join(kept, "edited"), "by hand")
        os.unlink(os.path.join(kept, "deleted"))
        shutil.rmtree(os.path.join(kept, "folder"))
        os.unlink(os.path.join(kept, "link"))
        os.symlink("fine", os.path.join(kept, "link"))
        os.unlink(os.path.join(kept, "dir"))
        os.mkdir(os.path.join(kept, "dir"))
        rotten = read_file(os.path.join(kept, "flipped")), read_file(os.path.join(kept, "edited"))
        before = {"b2": cluster.kept_inodes("b2"), "fine": untouched(os.path.join(kept, "fine"))}
        result = cluster.run("a", "verify")
        self.assertRc(1, result)
        for name in set(names) - {"fine"}:
            self.assertIn("all/" + name, result.stderr)
        self.assertNotIn("fine", result.stderr)
        self.assertEqual(len(self.files) - len(names) + 1, self.counted(), "what is wrong does not count")
        self.assertEqual(before["b2"], cluster.kept_inodes("b2"))
        for content in rotten:
            self.assertIn(content, self.aside("b1"))
        self.settle("a")
        self.assertEqual(len(self.files), self.counted())
        self.assertEqual(before["fine"], untouched(os.path.join(kept, "fine")))
        self.assertSilent(cluster.run("a", "verify"))

    def test_rot_in_every_copy_is_put_right_from_the_source(self):
        for backup, host in (("b1", "a"), ("b2", "b")):
            flip(self.c.kept_as(backup, "docs", "each/f"))
            self.assertRc(1, self.c.run(host, "verify"))
        self.settle("a", "b")

    def test_rot_in_a_backup_that_lost_its_database_is_put_right(self):
        flip(self.c.kept_as("b1", "docs", "lost/f"))
        os.unlink(os.path.join(self.c.backups["b1"].path, ".cbackup", "backup.db"))
        self.c.client("a", "--until-settled")
        self.settle("a")

    def test_rot_in_a_backup_that_lost_its_database_is_not_taken_for_the_truth_by_a_server_that_lost_its_state(self):
        flip(self.c.kept_as("b1", "docs", "both lost/f"))       # large: random samples of it miss the flipped byte
        os.unlink(os.path.join(self.c.backups["b1"].path, ".cbackup", "backup.db"))
        lose_state(self.c, "s")
        for host in "abab":
            self.assertNotIn("rotted", self.c.client(host).stderr)
        self.settle("a", "b")

    def test_a_restore_does_not_take_a_rotten_copy(self):
        for number in range(4):
            path = self.c.kept_as("b1" if number % 2 else "b2", "docs", "some/f%d" % number)
            flip(path)
            self.addCleanup(flip, path)
        target = self.c.path("target")
        self.assertRc(0, self.c.restore("a", "docs", "some", to=target))
        self.assertSameTree(os.path.join(self.source, "some"), os.path.join(target, "some"))


class ScrubTest(DecayCase):
    """Every copy is read once in the scrub period, a few in each pass."""

    files, keys = {"f%02d" % number: 2000 for number in range(12)}, {"scrub": "30d"}

    def test_rot_is_found_within_the_scrub_period_by_passes_alone(self):
        cluster = self.c
        flip(cluster.kept_as("b1", "docs", "f07"))
        cluster.client("a")
        self.assertEqual(12, self.counted(), "nothing is due yet")
        seen = []
        for turn in range(5):
            cluster.advance(8 * 86400)
            result = cluster.client("a")
            if turn % 2:
                cluster.client("b")
            seen += [line for line in result.error_lines if "f07" in line]
        self.assertEqual(1, len(seen), "it is said once")
        self.settle("a", "b")
        self.assertEqual(12, self.counted())


class StrangersTest(DecayCase):
    """What somebody put into a backup by hand is not ours."""

    files = {"sub/f": 2000, "g": 2000}

    def test_files_added_by_hand_are_left_alone(self):
        cluster = self.c
        root = cluster.backups["b1"].path
        added = ("docs/sub/added", "docs/own/folder/added", "beside", "other/deep")
        make_tree(root, dict.fromkeys(added, b"mine"))
        before = {name: untouched(os.path.join(root, name)) for name in added}

        def check():
            self.assertEqual([], [name for name in added if not os.path.lexists(os.path.join(root, name))], "gone")
            self.assertEqual(before, {name: untouched(os.path.join(root, name)) for name in added})
        for step in ("client", "verify", "client"):
            result = cluster.run("a", step)
            check()
            if step == "verify":
                self.assertRc(1, result)
                self.assertOneError(result, "b1: 2 files", "left alone", "docs/sub/added", "docs/own/folder/added")
            else:
                self.assertSilent(result)
        write_file(os.path.join(self.source, "sub/f"), "changed")
        make_tree(self.source, {"sub/new": 100})
        cluster.round("--until-settled", hosts="a")
        check()
        shutil.rmtree(os.path.join(self.source, "sub"))
        cluster.settle()
        check()
        os.unlink(os.path.join(root, ".cbackup", "backup.db"))      # is to be rebuilt from what lies there
        cluster.client("a", "--until-settled")
        check()
        for name in added:
            os.unlink(os.path.join(root, name))
        self.assertEqual([], violations(cluster))

    def test_a_file_of_the_source_takes_the_place_of_one_added_by_hand_without_losing_it(self):
        make_tree(self.c.kept_as("b1", "docs"), {"later": b"mine"})
        make_tree(self.source, {"later": 3000})
        self.settle("a", "b")
        self.assertIn(b"mine", [content for _, content in self.c.attic("b1", "docs")])


class RottenSourceTest(Case):
    """A source's file whose content changed while size and times did not is no new version: it is not spread."""

    def test_rot_at_the_source_is_reported_and_not_spread(self):
        if not shutil.which("mkfs.ext4"):
            self.skipTest("no mkfs.ext4: a file's content cannot be changed without its times")
        cluster = self.cluster("s", "a", "b", replicas=2)
        path = cluster.path("s", "source", "docs")
        image = cluster.path("image")
        os.makedirs(path)
        with open(image, "wb") as file:
            file.truncate(8 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        mount_or_skip(self, "-o", "loop", image, path)
        good = some_bytes(50000, "rotting")
        cluster.source("docs", "s", {"rotting": good, "fine": 100}, path=path)
        cluster.backup("b1", "a", "9M")
        cluster.backup("b2", "b", "9M")
        cluster.start()
        cluster.settle()
        cluster.stop("s")
        info = os.stat(os.path.join(path, "rotting"))
        subprocess.check_call(["umount", path])
        with open(image, "r+b") as file:
            data = file.read()
            at = data.index(good[:4096])
            file.seek(at + 100)
            file.write(b"ROT")
        mount_or_skip(self, "-o", "loop", image, path)
        rotten = read_file(os.path.join(path, "rotting"))
        now = os.stat(os.path.join(path, "rotting"))
        self.assertNotEqual(good, rotten)
        self.assertEqual((info.st_size, info.st_mtime_ns, info.st_ctime_ns), (now.st_size, now.st_mtime_ns, now.st_ctime_ns))
        cluster.start("s")
        shutil.rmtree(cluster.kept_as("b1", "docs"))        # so that b1 wants it again
        self.assertRc(1, cluster.run("a", "verify"))
        result = cluster.client("a")
        self.assertRc(1, result)
        self.assertRegex(result.stderr, r"rotting.*rotted")
        self.assertEqual(good, read_file(cluster.kept_as("b2", "docs", "rotting")))
        self.assertFalse(os.path.exists(cluster.kept_as("b1", "docs", "rotting")), "rot was spread")
        self.assertTrue(os.path.exists(cluster.kept_as("b1", "docs", "fine")))
        target = cluster.path("target")
        self.assertRc(0, cluster.restore("a", "docs", to=target))
        self.assertEqual(good, read_file(os.path.join(target, "rotting")))


if __name__ == "__main__":
    unittest.main()
