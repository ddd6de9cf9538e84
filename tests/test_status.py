"""status: what is safe and what is not, for people, for programs and for cron."""

import contextlib
import io
import os
import unittest

import cbackup
from tests import test_page
from tests.harness import Case, make_tree, write_file
from tests.test_travel import exchange

SOURCE_KEYS = {"host", "path", "replicas", "files", "bytes", "copies", "underserved_files", "underserved_bytes",
               "overserved_files", "state", "last_scan", "unproven_files", "unproven_since"}
BACKUP_KEYS = {"host", "path", "capacity", "used", "files", "last_seen", "state"}


class StatusCase(Case):
    """A source of 10 files on s (2 copies wanted), and backups; none of them was used before the test."""

    SIZES = [1000 + number for number in range(10)]

    @classmethod
    def begin(cls, cluster):
        cluster.source("docs", "s", {"f%d" % number: size for number, size in enumerate(cls.SIZES)})
        for host in cluster.hosts[1:]:
            cluster.backup("b" + host, host, "7M")
        cluster.start()
        return cluster

    def setUp(self):
        self.c = self.begin(self.cluster("s", "a", "b", name="casa"))

    @property
    def source(self):
        return self.c.sources["docs"].path

    def docs(self):
        docs = self.c.status()["sources"]["docs"]
        docs["copies"] = {count: files for count, files in docs["copies"].items() if files}
        return docs


class JsonTest(StatusCase):
    """`status --json` has exactly the keys of the contract, and its figures are those on the disks."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.begin(cls.share_cluster("s", "a", "b", "c", name="casa"))
        cls.c.settle()

    def setUp(self):
        pass    # one cluster for all of these, which each leaves as it was, but for the time

    def test_the_keys_and_kinds_are_those_of_the_contract(self):
        self.c.round()
        result = self.c.run("b", "status", "--json")
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)
        status = result.json
        self.assertEqual({"cluster", "config_version", "sources", "backups"}, set(status))
        self.assertEqual("casa", status["cluster"])
        self.assertEqual({"docs"}, set(status["sources"]))
        self.assertEqual({"ba", "bb", "bc"}, set(status["backups"]))
        docs = status["sources"]["docs"]
        self.assertEqual(SOURCE_KEYS, set(docs))
        self.assertEqual(("s", self.source, 2, 10, sum(self.SIZES), 0, 0, 0, "ok"), tuple(docs[key] for key in (
            "host", "path", "replicas", "files", "bytes", "underserved_files", "underserved_bytes", "overserved_files",
            "state")))
        self.assertTrue(0 <= docs["last_scan"] < 60, docs)
        for name, backup in status["backups"].items():
            self.assertEqual(BACKUP_KEYS, set(backup))
            self.assertEqual((self.c.backups[name].host, self.c.backups[name].path, 7 << 20, self.c.kept_bytes(name)),
                             tuple(backup[key] for key in ("host", "path", "capacity", "used")))
            self.assertEqual(sum(name in backups for backups in self.c.copies_on_disk("docs").values()),
                             backup["files"])
            self.assertTrue(0 <= backup["last_seen"] < 60, backup)
            self.assertIsInstance(backup["state"], str)

    def test_a_confirmed_copy_of_an_old_version_does_not_count(self):
        self.addCleanup(self.c.settle)
        self.addCleanup(make_tree, self.source, {"f3": self.SIZES[3]})
        write_file(os.path.join(self.source, "f3"), "changed")
        self.c.client("c")
        docs = self.docs()
        self.assertLess(sum(int(count) * files for count, files in docs["copies"].items()), 20 + 1)
        self.assertEqual(sum(len(backups) for backups in self.c.copies_on_disk("docs").values()),
                         sum(int(count) * files for count, files in docs["copies"].items()))

    def test_every_host_says_the_same(self):
        answers = [self.c.status(host) for host in "sabc"]
        for answer in answers:
            answer["sources"]["docs"].pop("last_scan")
            for backup in answer["backups"].values():
                backup.pop("last_seen")
        self.assertEqual([answers[0]] * 4, answers)

    def test_last_seen_and_last_scan_are_seconds(self):
        self.c.advance(3600)
        status = self.c.status()
        for age in (status["sources"]["docs"]["last_scan"], status["backups"]["ba"]["last_seen"]):
            self.assertTrue(3600 <= age < 3700 or age < 60, age)
        self.assertGreaterEqual(status["backups"]["ba"]["last_seen"], 3600)

    def test_asking_changes_nothing(self):
        before = [self.c.kept_inodes(backup) for backup in self.c.backups]
        for _ in range(2):
            self.c.run("a", "status")
        self.assertEqual(before, [self.c.kept_inodes(backup) for backup in self.c.backups])
        self.assertTrue(self.c.client("a").json["settled"])


class StagesTest(StatusCase):
    """The figures follow what happens."""

    def test_copies_counts_hosts_at_every_stage(self):
        docs = self.docs()
        self.assertEqual(({"0": 10}, 10, sum(self.SIZES)), (docs["copies"], docs["underserved_files"], docs["underserved_bytes"]))
        self.c.client("a")
        docs = self.docs()
        self.assertEqual(({"1": 10}, 10), (docs["copies"], docs["underserved_files"]))
        self.c.client("b")
        docs = self.docs()
        self.assertEqual(({"2": 10}, 0), (docs["copies"], docs["underserved_files"]))
        write_file(os.path.join(self.source, "f3"), "changed")
        make_tree(self.source, {"new": 50})
        self.c.client("a")
        docs = self.docs()
        self.assertEqual(({"1": 2, "2": 9}, 2, 57, 11), (docs["copies"], docs["underserved_files"],
                                                        docs["underserved_bytes"], docs["files"]))

    def test_fewer_replicas_make_files_overserved(self):
        self.c.round()
        self.c.keys["replicas"] = 1
        self.c.passes("ab")
        docs = self.docs()
        self.assertEqual((1, 10, 0), (docs["replicas"], docs["overserved_files"], docs["underserved_files"]))

    def test_a_source_whose_host_is_down_is_unreachable_and_the_others_are_not(self):
        self.c.source("mine", "a", replicas=1)
        self.c.write_config()
        exchange(self.c, "b")
        self.c.kill("s")
        result = self.c.run("b", "status", "--json")
        self.assertEqual(("unreachable", "ok"), tuple(result.json["sources"][name]["state"]
                                                      for name in ("docs", "mine")))
        self.assertEqual(SOURCE_KEYS, set(result.json["sources"]["docs"]))
        self.assertRc(1, result)


class CheckTest(StatusCase):
    """`status --check` prints one line and exits 0 when every file of every source has its N copies, else 1."""

    def check(self, rc):
        result = self.c.run("a", "status", "--check")
        self.assertRc(rc, result)
        self.assertEqual(1, len(result.stdout.splitlines()), str(result))
        self.assertEqual("", result.stderr)
        return result.stdout

    def test_check_follows_what_is_safe(self):
        self.check(1)
        self.c.client("a")
        self.check(1)
        self.c.client("b")
        self.check(0)
        make_tree(self.source, {"new": 50})
        self.c.client("a")
        self.assertIn("docs", self.check(1))
        self.c.client("b")
        self.check(0)
        self.c.kill("b")            # a backup that is down has lost nothing
        self.c.kill("s")            # of a source that is down it is known what it was like
        self.assertRegex(self.check(0), r"^safe: 11 files .*; s asleep since \d+ seconds?; safe then")
        os.unlink(os.path.join(self.c.home("a"), "state", "heard.json"))
        self.assertRegex(self.check(1), r"^NOT SAFE: docs .*nothing is known")


class NewSourceTest(unittest.TestCase):

    def test_a_source_that_was_not_looked_at_is_not_called_empty(self):
        facts = dict(test_page.HtmlTest.source_facts(), files=0, bytes=0, copies={}, last_scan=None)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            cbackup.print_status(test_page.HtmlTest.status(sources={"docs": facts}), {})
        self.assertIn("docs  (s:/x)\n    it has not been looked at yet\n", said.getvalue())
        self.assertNotIn("0 files", said.getvalue())


class ForPeopleTest(StatusCase):
    """Without options, status is text that names every source and every backup."""

    def test_every_source_and_backup_is_named(self):
        self.c.round()
        result = self.c.run("a", "status")
        self.assertRc(0, result)
        for word in ["docs"] + list(self.c.backups):
            self.assertIn(word, result.stdout)

    def test_what_is_not_safe_is_said(self):
        result = self.c.run("a", "status")
        self.assertRegex(result.stdout, r"\b10\b")
        self.c.kill("s")
        result = self.c.run("a", "status")
        self.assertRegex(result.text, r"unreachable|not reachable|not be reached|not answer|\bdown\b")


if __name__ == "__main__":
    unittest.main()
