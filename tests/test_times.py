"""What the configuration says of time, just before it and just after it, by the clock that tests can set."""

import os
import tempfile
import threading
import time
import unittest
from unittest import mock

import cbackup
from tests.harness import Case, make_tree, wait_for, write_file
from tests.members import Member

HOUR, DAY = 3600, 86400


class LookingTest(Case):
    """`scan`: how often a server looks by itself; `scan_min`: how old a look may be for a client's pass."""

    def start(self, **keys):
        self.c = self.cluster("s", "a", replicas=1, **keys)
        self.root = self.c.source("src", "s", {"one": b"1"})
        self.c.backup("ba", "a", "8M")
        self.c.start("s")
        member = Member(self.c, "ba", "src")
        self.addCleanup(member.channel.close)
        self.facts = lambda: member.ask("status")["sources"]["src"]
        wait_for(lambda: self.looked() is not None, 20, "no first look")
        return self.c

    def looked(self):
        return self.facts()["last_scan"]

    def files(self):
        return self.facts()["files"]

    def test_a_server_looks_again_after_scan_and_not_before(self):
        c = self.start(scan="1h")
        make_tree(self.root, {"two": b"2"})
        c.advance(HOUR - 300 - self.looked())
        time.sleep(1)       # it looks at the clock some times in this second
        self.assertEqual(1, self.files())
        c.advance(600)
        wait_for(lambda: self.files() == 2, 20, "no look after `scan`")

    def test_a_pass_makes_the_server_look_when_the_last_look_is_older_than_scan_min(self):
        c = self.start(scan="30d", scan_min="1h")
        self.assertEqual(1, c.client("a").json["copied_files"])
        make_tree(self.root, {"two": b"2"})
        c.advance(HOUR - 300 - self.looked())
        self.assertEqual(0, c.client("a").json["copied_files"])
        c.advance(600)
        self.assertEqual(1, c.client("a").json["copied_files"])

    def test_clients_that_wait_for_a_look_do_not_keep_each_other_awake(self):
        asked = []
        books = mock.Mock(active_sources=lambda: asked.append(1) or ["src"])
        scanner = cbackup.Scanner(mock.Mock(books=books))       # not started: there is no look
        waiting = [threading.Thread(target=scanner.look, args=(0.0, 0.3)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        self.assertLess(len(asked), 3 * 5)


class BooksCase(unittest.TestCase):
    """The books of a source with one file, and a clock."""

    CONFIG = ("[cluster]\nname = t\nreplicas = 1\n[hosts]\ns = x\na = x\nb = x\n[sources]\ndocs = s:%s\n"
              "[backups]\nba = a:/ba size=1G\nbb = b:/bb size=1G\n")

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        root, clock = os.path.join(scratch.name, "docs"), os.path.join(scratch.name, "clock")
        make_tree(root, {"file": b"1"})
        self.clock = clock
        self.at(0)
        for patch in (mock.patch.dict(os.environ, CBACKUP_TEST="1", CBACKUP_TEST_CLOCK=clock),
                      mock.patch.object(cbackup, "clock", cbackup.Clock())):     # it never goes back
            patch.start()
            self.addCleanup(patch.stop)
        config = cbackup.parse_config(self.CONFIG % root)
        self.books = cbackup.Books(os.path.join(scratch.name, "books.db"), "s")
        self.addCleanup(self.books.close)
        self.books.configure(config)
        cbackup.run_scan(self.books, config.sources["docs"])
        self.row = self.books.source_row("docs")
        self.a, self.b = self.books.hear("ba", {}), self.books.hear("bb", {})

    def at(self, seconds):
        write_file(self.clock, "%s" % seconds)
        cbackup.clock._set = -1.0, 0.0      # as if the file had not been read just now

    def claim(self, backup):
        """The paths that a backup is given, when it asks for all that is underserved."""
        self.books.expire(14 * DAY)
        return [row[0] for row in self.books.claim(backup, self.row, 1 << 30, 10, 1 << 30)]

    def copies(self):
        return self.books.figures(self.row)["copies"].get("1", 0)


class LeasesTest(BooksCase):
    """Claims, declines, and the absence of a backup."""

    def test_a_claim_expires_after_an_hour_and_not_before(self):
        self.assertEqual([b"file"], self.claim(self.a))
        self.at(HOUR - 60)
        self.assertEqual([], self.claim(self.b))
        self.at(HOUR + 60)
        self.assertEqual([b"file"], self.claim(self.b))

    def test_a_claim_of_a_backup_that_is_heard_of_lives_on(self):
        self.assertEqual([b"file"], self.claim(self.a))
        self.at(HOUR - 60)
        self.books.hear("ba", {})
        self.at(HOUR + 60)
        self.assertEqual([], self.claim(self.b))
        self.at(2 * HOUR)
        self.assertEqual([b"file"], self.claim(self.b))

    def test_a_decline_ends_after_a_day_and_not_before(self):
        self.claim(self.a)
        version = self.books.version_of(self.row["id"], b"file")["version"]
        self.books.decline(self.a, self.row["id"], [(b"file", version, "no room")])
        self.at(DAY - 60)
        self.assertEqual([], self.claim(self.a))
        self.at(DAY + 60)
        self.assertEqual([b"file"], self.claim(self.a))

    def test_a_backup_counts_for_lost_after_and_no_longer(self):
        facts = self.books.version_of(self.row["id"], b"file")
        digest = cbackup.new_digest()
        digest.update(b"1")
        self.claim(self.a)
        self.books.record_check(self.a, self.row, [(facts["id"], facts["version"], digest.digest())])
        self.books.count_copies(self.a, self.row["id"], [(b"file", facts["version"], 1)])
        self.at(14 * DAY - 60)
        self.books.expire(14 * DAY)
        self.assertEqual(1, self.copies())
        self.at(14 * DAY + 60)
        with self.assertLogs("cbackup", "WARNING"):
            self.books.expire(14 * DAY)
        self.assertEqual(0, self.copies())
        self.books.hear("ba", {})
        self.assertEqual(1, self.copies(), "heard of again, and nothing counts")
        self.books.hear("ba", {})
        self.assertEqual(1, self.copies(), "it is back")


class KeepTest(Case):
    """`keep`: how long old versions stay; `scrub`: after how long every copy was read again; `read_rate`."""

    def start(self, files, **keys):
        self.c = c = self.cluster("s", "a", replicas=1, **keys)
        self.root = c.source("src", "s", files)
        c.backup("ba", "a", "64M")
        c.start("s")
        self.assertRc(0, c.client("a"))
        return c

    def test_old_versions_stay_for_keep_and_go_then(self):
        c = self.start({"old": b"old", "other": b"1"}, keep="10d", lost_after="90d", scrub="90d")
        os.unlink(os.path.join(self.root, "old"))
        c.client("a")
        for days, kept in ((9.9, 1), (10.1, 0)):
            c.advance(days * DAY - c.now)
            c.client("a")
            self.assertEqual(kept, len(c.attic("ba", "src")), "after %g days" % days)

    def test_every_copy_is_read_again_within_scrub(self):
        c = self.start({"file": b"right"}, keep="90d", lost_after="90d", scrub="10d")
        copy = c.kept_as("ba", "src", "file")
        info = os.stat(copy)
        write_file(copy, b"wrong")
        os.utime(copy, ns=(info.st_mtime_ns, info.st_mtime_ns))
        c.advance(4 * DAY)
        c.client("a")
        with open(copy, "rb") as file:
            self.assertEqual(b"wrong", file.read(), "read again before half of the period is over")
        c.advance(7 * DAY)
        c.client("a")
        c.client("a")
        with open(copy, "rb") as file:
            self.assertEqual(b"right", file.read())

    def test_reading_is_slowed_down_to_read_rate(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x" * 600000)
            file.flush()
            took = {}
            for rate in (None, 300000.0):
                begun = time.monotonic()
                cbackup.digest_descriptor(file.fileno(), cbackup.Pace(rate))
                took[rate] = time.monotonic() - begun
        self.assertGreater(took[300000.0], 1.5)
        self.assertLess(took[None], 1.5)


if __name__ == "__main__":
    unittest.main()
