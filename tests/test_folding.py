"""File systems to which `A` and `a` are one name: one of the two is kept there, the other elsewhere, and nothing is mistaken."""

import contextlib
import os
import unittest

import cbackup
from tests.faults import folding_or_skip
from tests.harness import Case, one_in, read_file, write_file

NFC, NFD = "caf\u00e9", "cafe\u0301"
PAIRS = [("Name", "name"), ("Dir/x", "dir/x"), ("dir/Deep/y", "dir/deep/y")]
ALONE = ["Dir/one", "dir/two", "plain", "Stra\u00dfe", "strasse", NFC]


@one_in(2)
class FoldingTest(Case):
    """One copy wanted; the backup of a is on such a file system, that of b is not."""

    def setUp(self):
        self.c = c = self.cluster("s", "a", "b", replicas=1)
        self.source = c.source("docs", "s", {name: "content of " + name for name in ALONE + [n for p in PAIRS for n in p]})
        folding_or_skip(self, c.backup("ba", "a", "9M"))
        c.start()

    def names_at(self, backup):
        return {name for name, there in self.c.copies_on_disk("docs").items() if backup in there}

    def content(self, path):
        with contextlib.suppress(OSError):
            return read_file(path).decode()

    def assertNothingMistaken(self):
        self.assertEqual([], self.c.attic("ba", "docs"))
        verify = self.c.run("a", "verify")
        self.assertEqual(("", 0), (verify.stderr, verify.rc), str(verify))

    def test_one_of_two_is_kept_and_the_other_is_named_and_taken_by_another(self):
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertEqual(len(PAIRS), result.json["failed_files"], str(result))
        for pair in PAIRS:
            lines = [line for line in result.error_lines if "differs only in case from" in line
                     and any("docs: %s:" % name in line for name in pair)]
            self.assertEqual(1, len(lines), str(result))
        self.assertNothingMistaken()
        for name in ALONE:
            self.assertEqual("content of " + name, self.content(self.c.kept_as("ba", "docs", name)))
        self.assertEqual(0, self.c.client("a").json["failed_files"])
        self.c.backup("bb", "b", "9M")
        self.c.settle(["b", "a"])
        for pair in PAIRS:
            for name in pair:
                self.assertIn("content of " + name, [self.content(self.c.kept_as(b, "docs", name)) for b in ("ba", "bb")])
        # Each changes, is removed and comes back: the other's copy stays what it is.
        for second in (PAIRS[0][1], PAIRS[1][0]):
            path = os.path.join(self.source, second)
            write_file(path, "new content of " + second)
            self.c.settle(["a", "b"])
            os.unlink(path)
            self.c.settle(["b", "a"])
            write_file(path, "content of " + second)
            self.c.settle(["b", "a"])
        verify = self.c.run("a", "verify")
        self.assertEqual(("", 0), (verify.stderr, verify.rc), str(verify))
        to = os.path.join(self.directory(), "to")
        self.assertRc(0, self.c.restore("b", "docs", to=to))
        self.assertSameTree(self.source, to, ignore=["mode", "mtime_ns"])

    def test_names_links_and_directories_that_cannot_be_there_are_named_once_and_stop_nothing(self):
        bad = os.path.join(os.fsencode(self.source), b"not UTF-8 \xff")
        for path in (bad, os.path.join(self.source, "10:30"), os.path.join(self.source, "name")):
            write_file(path, b"1")
        for number in range(5):
            os.symlink("plain", os.path.join(self.source, "link %d" % number))
        os.mkdir(os.path.join(self.source, "empty: no"))
        first = self.c.client("a")
        for name in ALONE:
            self.assertEqual("content of " + name, self.content(self.c.kept_as("ba", "docs", name)))
        for name in ("10:30", "not UTF-8"):
            self.assertTrue(any("docs: " + name in line and "changed" not in line for line in first.error_lines), str(first))
        self.assertTrue(any("5 directories or symlinks" in line for line in first.error_lines), str(first))
        self.assertLess(len(first.error_lines), 10, str(first))
        again = self.c.client("a")
        self.assertEqual(0, again.json["failed_files"], str(again))
        self.c.backup("bb", "b", "9M")
        self.c.settle(["b", "a"])
        to = os.path.join(self.directory(), "to")
        self.assertRc(0, self.c.restore("b", "docs", to=to))
        self.assertSameTree(self.source, to, ignore=["mode", "mtime_ns"])

    def test_a_rename_that_changes_only_the_case_and_one_onto_a_taken_name(self):
        os.unlink(os.path.join(self.source, "name"))
        self.c.client("a")
        os.rename(os.path.join(self.source, "Name"), os.path.join(self.source, "nAME"))
        result = self.c.client("a")
        self.assertEqual((1, 0), (result.json["moved_files"], result.json["copied_files"]), str(result))
        self.assertIn("nAME", os.listdir(self.c.kept_as("ba", "docs")))
        os.rename(os.path.join(self.source, "plain"), os.path.join(self.source, "NAME"))
        result = self.c.client("a")
        self.assertIn("NAME: differs only in case from nAME", self.c.client("a").stderr + result.stderr)
        self.assertEqual("content of Name", self.content(self.c.kept_as("ba", "docs", "nAME")))
        self.assertEqual(["plain"], [os.path.basename(name) for name, _ in self.c.attic("ba", "docs")])
        self.assertRc(0, self.c.run("a", "verify"))

    def test_a_lost_database_is_made_again_under_the_names_that_the_source_has(self):
        self.c.client("a")
        before = self.names_at("ba")
        os.unlink(os.path.join(self.c.backups["ba"].path, ".cbackup", "backup.db"))
        result = self.c.client("a")
        self.assertEqual(0, result.json["copied_files"] + result.json["updated_files"], str(result))
        self.c.client("a")
        self.assertNothingMistaken()
        self.assertEqual(before, self.names_at("ba"))

    def test_a_restore_onto_such_a_file_system_brings_one_of_the_two_and_names_the_other(self):
        self.c.backup("bb", "b", "9M")
        self.c.settle(["b", "a"])
        to = self.c.path("target")
        folding_or_skip(self, to)
        result = self.c.restore("b", "docs", to=to)
        self.assertRc(1, result)
        for pair in PAIRS:
            lines = [line for line in result.error_lines if "differs only in case from" in line
                     and any(line.startswith("cbackup: %s:" % name) for name in pair)]
            self.assertEqual(1, len(lines), str(result))
        for name in ALONE:
            self.assertEqual("content of " + name, self.content(os.path.join(to, name)))
        for pair in PAIRS:
            self.assertIn(self.content(os.path.join(to, pair[0])), ["content of " + name for name in pair])
        again = self.c.restore("b", "docs", to=to)
        self.assertRc(1, again)
        self.assertIn("(0 files restored", again.stdout, str(again))


class FoldingTree(cbackup.Tree):
    """A tree on a file system that takes names for the same by case and by normal form; what it has it lists as it was given,
    or, with `decomposed`, in its own form."""

    decomposed = False

    def _parent(self, rel, make=False):
        descriptor, name = super()._parent(rel, make)
        return descriptor, self.as_here(descriptor, name)

    def _step(self, descriptor, part, make):
        return super()._step(descriptor, self.as_here(descriptor, part), make)

    def as_here(self, descriptor, name):
        there = [os.fsencode(each) for each in os.listdir(descriptor)]
        found = [each for each in there if cbackup.fold_key(each) == cbackup.fold_key(name)]
        if not found and self.decomposed:
            import unicodedata
            return unicodedata.normalize("NFD", name.decode()).encode()
        return found[0] if found else name


class StandInTest(Case):
    """The same in one process, where no such file system can be mounted; and with forms of letters, which FAT does not fold."""

    def vault(self, decomposed=False):
        base = self.directory()
        vault = cbackup.Vault(cbackup.Backup("b1", "a", os.path.join(base, "b1"), size=1 << 20), "c")
        self.addCleanup(vault.close)
        vault.tree.close()
        vault.tree = FoldingTree(vault.path, own_links=True)
        vault.tree.decomposed = decomposed
        return vault

    def bring(self, vault, name, content):
        """What a pass does with a file that has arrived; returns the error when it cannot be put into its place."""
        path, data = name.encode(), content.encode()
        digest = cbackup.new_digest()
        digest.update(data)
        vault.expect("docs", "b", [cbackup.Wanted(path, len(data), 1, 0o644, os.geteuid(), os.getegid(), 1)])
        vault.tree.make_directory(vault.incoming("docs"))
        write_file(os.path.join(vault.meta_path, "incoming", "docs", name), data)
        vault.plan_places("docs", [(path, digest.digest())])
        try:
            vault.put_in_place("docs", path, vault.planned("docs")[path])
        except OSError as error:
            vault.give_up("docs", [path])
            vault._finish_attic()
            return error.strerror
        vault.arrived("docs", [path])
        return None

    def test_what_is_folded_is_learned(self):
        self.assertEqual(("cf", "cfn"), (self.vault()._learn_folding(), self.vault(decomposed=True)._learn_folding()))
        plain = cbackup.Vault(cbackup.Backup("b1", "a", os.path.join(self.directory(), "b1"), size=1 << 20), "c")
        self.addCleanup(plain.close)
        self.assertFalse(plain.folds)

    def test_a_name_that_is_anothers_is_refused_and_the_other_stays(self):
        for decomposed in (False, True):
            vault = self.vault(decomposed)
            self.assertIsNone(self.bring(vault, "Name", "1"))
            self.assertIn("differs only in case from Name", self.bring(vault, "nAME", "22") or "")
            self.assertIsNone(self.bring(vault, NFC, "3"))
            self.assertIn("differs only in Unicode normal form from", self.bring(vault, NFD, "44") or "")
            self.assertIsNone(self.bring(vault, "Name", "555"))        # a new version of what is here is no other name
            self.assertIsNone(self.bring(vault, NFC, "666"))
            self.assertEqual(b"555", read_file(os.path.join(vault.spec.path, "docs", "Name")))
            self.assertEqual([(1, b"Name"), (1, NFC.encode())], vault.rows("SELECT size, path FROM attic WHERE done=1"))
            self.assertEqual([1] * 2, [size for (size,) in vault.rows("SELECT size FROM attic")])
            vault.set_aside("docs", [b"nAME", NFD.encode()], "deleted")     # nothing of theirs is here
            self.assertEqual(2, len(vault.rows("SELECT 1 FROM attic")))
            for rel in vault.tree.walk_files(b"docs"):
                self.assertTrue(vault.is_known("docs", rel[5:]) or vault.is_here_as("docs", rel[5:]), rel)

    def test_two_names_of_one_batch_are_not_fetched_together(self):
        vault = self.vault()
        config = cbackup.parse_config("[hosts]\ns=1.1.1.1\na=1.1.1.2\n[sources]\ndocs=s:/x\n[backups]\nb1=a:%s size=1M\n"
                                      % vault.spec.path)
        one = cbackup.Pass(vault, config, "a", {}, cbackup.Figures())
        files = [cbackup.Wanted(name.encode(), 1, 1, 0o644, 0, 0, 1) for name in ("A", "b", "a", "B", "c")]
        now, later = one._that_can_stand_here(cbackup.Standing("docs", "s", None, "b", {"state": "ok"}), files)
        self.assertEqual(([b"A", b"b", b"c"], [b"a", b"B"]), ([f.path for f in now], [f.path for f in later]))


if __name__ == "__main__":
    unittest.main()
