"""A backup's directory: what is taken for one, who may look into it, and what happens to old versions in it."""

import os
import unittest

from tests.harness import Case, inodes, make_tree, tree, write_file


class InUseTest(Case):
    """A directory that somebody uses for something else does not become a backup, and nothing in it is touched."""

    def setUp(self):
        self.c = self.cluster("s", "a", replicas=1)
        self.c.source("docs", "s", {"f": "1", "d/g": "2"})
        self.kept = self.c.backup("b1", "a", "9M")

    def refused(self):
        before = inodes(self.kept), tree(self.kept)
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "b1", self.kept, "not empty", "--adopt b1")
        self.assertFalse(result.json["settled"])
        self.assertEqual(before, (inodes(self.kept), tree(self.kept)))
        return result

    def test_files_of_the_users_own_are_refused_with_the_way_out_and_stay(self):
        make_tree(self.kept, {"docs/f": "my own", "docs/mine": "my own", "notes.txt": "my own"})
        self.c.start()
        self.assertIn("docs, notes.txt", self.refused().stderr)
        self.refused()
        self.assertIn("2 files", self.c.client("a", "--adopt", "b1").stderr)     # what was said: these are copies
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)
        self.assertEqual([b"my own"] * 2, [data for _, data in self.c.attic("b1", "docs")])

    def test_an_empty_directory_of_somebody_is_refused_too(self):
        os.mkdir(os.path.join(self.kept, "holidays"))
        self.c.start()
        self.refused()

    def test_a_cbackup_directory_without_its_identity_is_refused(self):
        self.c.start()
        self.c.settle()
        os.unlink(os.path.join(self.kept, ".cbackup", "identity"))
        os.unlink(os.path.join(self.c.home("a"), "state", "backups.json"))
        self.refused()
        self.assertRc(0, self.c.client("a", "--adopt", "b1"))
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)
        self.assertEqual([], self.c.attic("b1", "docs"))

    def test_what_a_system_puts_into_a_file_systems_root_is_nothing(self):
        make_tree(self.kept, {"lost+found/x": "1", ".DS_Store": "2", ".Trashes/501/y": "3", ".Trash-1000/info/z": "4"})
        self.c.start()
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)

    def test_what_a_first_pass_that_was_cut_off_has_left_is_nothing(self):
        os.mkdir(os.path.join(self.kept, ".cbackup"))
        write_file(os.path.join(self.kept, ".cbackup", "identity.4711.new"), "{")
        self.c.start()
        self.c.settle()
        self.assertCopies(self.c, "docs", 1)


if __name__ == "__main__":
    unittest.main()
