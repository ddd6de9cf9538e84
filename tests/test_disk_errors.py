"""Disks that fail: reading, writing, syncing and renaming end with EIO or ENOSPC, now here and now there. Nothing is lost, nothing
is called a copy that is not whole, what cannot be read is not taken for deleted, and all else goes on."""

import errno
import os
import random
import unittest

from tests.faults import share_failing, violations
from tests.harness import Case, make_tree, some_bytes, tree, write_file
from tests.members import Member

ROUNDS = int(os.environ.get("CBACKUP_TEST_ROUNDS", "1"))
CALLS = ["read,pread", "write,pwrite", "fsync", "syncfs", "rename", "link", "readdir"]
WHERE = ["*/source/docs/*", "*/backup/b?/*", "*/backup/b?/docs*", "*/backup/b?/.cbackup/backup.db*", "*/home/state/*", "*/cbackup-test-*/[sab]/*"]


class DiskErrorsTest(Case):
    """A source on s, copies on a and b; the calls of all of their processes may be made to fail."""

    @classmethod
    def setUpClass(cls):
        share_failing(cls, "9M")
        cls.c.start("s")
        cls.number = 0
        cls.c.passes("ab")

    def setUp(self):
        self.calls.heal()
        self.assertEqual([], violations(self.c), "what the test before has left")

    def recovers(self):
        """All is well again, without any help, after a few passes."""
        self.calls.heal()
        self.calls.failed()
        for _ in range(5):
            results = self.c.passes("ab")
            if all(result.rc == 0 for result in results) and not violations(self.c):
                return
        self.fail("\n".join(map(str, results)) + "\n" + "\n".join(violations(self.c)))

    def new(self, count=3, size=5000):
        """New files in the source; their paths."""
        DiskErrorsTest.number += 1
        names = ["new%d/%d" % (self.number, n) for n in range(count)]
        make_tree(self.source, dict.fromkeys(names, size))
        return names

    def edit(self, name, content):
        write_file(os.path.join(self.source, name), content)

    def assertFailed(self, call):
        """Calls have failed: else nothing was tried."""
        failed = self.calls.failed()
        self.assertTrue([line for line in failed if line.startswith((call + " ", "p%s " % call))], failed)

    def copies(self):
        """{how many copies: files}, as the server counts them."""
        with Member(self.c, "ba", "docs") as member:
            return {int(copies): files for copies, files in member.ask("status")["sources"]["docs"]["copies"].items()}

    # -- the source's disk

    def test_a_file_that_cannot_be_read_is_named_and_the_others_are_copied(self):
        bad, *others = self.new()
        before = self.copies()
        self.calls.fail("read,pread", errno.EIO, "*source/docs/" + bad)
        self.calls.fail("read,pread", errno.EIO, bad)      # to the rsync of the server, whose root directory that is
        result = self.c.client("a")
        self.assertFailed("read")
        self.assertRc(1, result)
        self.assertOneError(result, bad, "its host cannot read it")
        self.assertEqual((len(others), 1), (result.json["copied_files"], result.json["failed_files"]))
        self.assertEqual({0: 1, 1: len(others), 2: before[2]}, self.copies())
        self.c.advance(25 * 3600)       # until then it is left to others
        self.recovers()

    def test_a_copy_that_cannot_be_read_back_is_named_and_the_others_are_copied(self):
        bad, *others = self.new()
        self.calls.fail("read,pread", errno.EIO, "*/backup/ba/*" + bad)
        result = self.c.client("a")
        self.assertFailed("read")
        self.assertRc(1, result)
        self.assertOneError(result, bad, "cannot be read back", self.c.backups["ba"].path, "Input/output error")
        self.assertEqual(len(others), result.json["copied_files"])
        self.c.advance(25 * 3600)
        self.recovers()

    def test_files_that_cannot_be_read_or_listed_any_more_are_not_taken_for_deleted(self):
        self.edit("d2/f2", "edited, and then the disk failed")
        before = [tree(backup.path + "/docs") for backup in self.c.backups.values()]
        self.calls.fail("readdir", errno.EIO, "*source/docs/d1")
        self.calls.fail("read,pread", errno.EIO, "*d2/f2")
        for result in self.c.passes("ab"):
            self.assertRc(1, result)
            self.assertIn("d1: Input/output error", result.stderr)
            self.assertIn("d2/f2: ", result.stderr)
        self.assertFailed("readdir")
        self.assertEqual(before, [tree(backup.path + "/docs") for backup in self.c.backups.values()])
        self.c.advance(25 * 3600)
        self.recovers()

    # -- a backup's disk

    def test_a_backup_whose_disk_takes_no_more_says_so_and_has_no_torn_copy(self):
        for number, words in self.todays(((errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output error")), 1):
            with self.subTest(words):
                self.new(size=200000)
                self.calls.fail("write", number, "*/backup/ba/.cbackup/incoming/*", skip=1)
                result = self.c.client("a")
                self.assertFailed("write")
                self.assertRc(1, result)
                self.assertIn(words, result.stderr)
                self.assertEqual([], violations(self.c, settled=False))
                self.assertEqual(3, self.c.client("b").json["copied_files"])
                self.c.advance(25 * 3600)       # EIO may be the fault of a single file, which is left to others until then
                self.recovers()

    def test_what_the_disk_could_not_make_durable_does_not_count_and_is_copied_again(self):
        """Its bytes are in memory still, and would be read as right; they may never have reached the disk."""
        for syncfs in self.todays((errno.EIO, errno.ENOSYS), 1):
            with self.subTest(errno.errorcode[syncfs]):
                names = self.new()
                self.edit("d0/f0", "edited after %d" % self.number)
                before = self.copies()
                self.calls.fail("syncfs", syncfs, "*/backup/ba")
                if syncfs == errno.ENOSYS:
                    self.calls.fail("fsync", errno.EIO, "*/backup/ba/docs/*")
                result = self.c.client("a")
                self.assertFailed("syncfs" if syncfs == errno.EIO else "fsync")
                self.assertRc(1, result)
                self.assertIn(self.c.backups["ba"].path + ": Input/output error", result.stderr)
                self.assertEqual(before[2] - 1, self.copies().get(2, 0), "the edited one has not, no new one has any")
                self.calls.heal()
                figures = [self.c.client("a").json for _ in range(2)]
                self.assertEqual((len(names), 1), tuple(sum(one[key] for one in figures) for key in (
                    "copied_files", "updated_files")))
                self.recovers()

    def test_a_rename_that_fails_leaves_the_old_version_in_its_place(self):
        self.edit("d0/f3", "edited")
        self.calls.fail("rename", errno.EIO, "*/backup/ba/docs/*")
        result = self.c.client("a")
        self.assertFailed("rename")
        self.assertRc(1, result)
        self.assertIn("Input/output error", result.stderr)
        self.assertEqual(3003, os.path.getsize(self.c.kept_as("ba", "docs", "d0/f3")))
        self.recovers()

    # -- the books' disk

    def test_a_server_whose_books_cannot_be_written_counts_nothing_and_goes_on_when_they_can(self):
        for number in self.todays((errno.EIO, errno.ENOSPC), 1):
            with self.subTest(errno.errorcode[number]):
                before = self.copies()
                self.new()
                self.calls.fail("write,pwrite,fsync", number, "*/s/home/state/books.db*")
                self.assertRc(1, self.c.client("a"))
                self.assertTrue(self.calls.failed())
                self.calls.heal()
                self.assertEqual(before[2], self.copies()[2])
                self.recovers()

    # -- a home

    def test_a_name_that_cannot_be_read_is_not_taken_for_another(self):
        self.calls.fail("read", errno.EIO, "*/a/home/host")
        result = self.c.client("a")
        self.assertFailed("read")
        self.assertRc(1, result)
        self.assertOneError(result, os.path.join(self.c.home("a"), "host") + ": Input/output error")

    # -- anything, anywhere

    def test_whatever_fails_wherever_nothing_is_lost(self):
        dice = random.Random(12)
        turns = [(turn, dice.choice(CALLS), dice.choice(WHERE), dice.randrange(12), dice.choice([errno.EIO, errno.ENOSPC]),
                  dice.choice([1, 1, 3])) for turn in range(6 * ROUNDS)]
        for turn, calls, where, skip, number, every in self.todays(turns, ROUNDS):
            with self.subTest(turn=turn, calls=calls, where=where, skip=skip):
                edited, before = "d1/f%d" % (1 + 3 * (turn % 4)), self.c.copies_on_disk("docs")
                self.new(2)
                self.edit(edited, some_bytes(4000, turn))
                self.addCleanup(self.calls.heal)
                self.calls.fail(calls, number, where, skip, every)
                for result in self.c.passes("ab"):
                    if "/home/" not in result.stderr:       # of what every command needs it may be said as of a wrong configuration
                        self.assertIn(result.rc, (0, 1), str(result))
                    self.assertEqual(bool(result.rc), bool(result.error_lines), str(result))
                after = self.c.copies_on_disk("docs")
                self.assertEqual([], [name for name in before if name != edited and before[name] != after[name]])
                self.calls.heal()
                for copies, files in self.copies().items():     # as long as its server could not look, the edited one is as it was
                    self.assertLessEqual(files - 1, sum(len(names) >= copies for names in after.values()))
                self.c.advance(25 * 3600)
                self.recovers()


if __name__ == "__main__":
    unittest.main()
