"""A digest is a fact only when the source's server has read its file: everything else is presumed, acted on, and proven.

Each story makes bytes different in a way that size, time and often the inode do not show, and then asks the disks.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import unittest
from unittest import mock

import cbackup
from tests.harness import Case, copy_wrong_bytes, read_file, some_bytes, wait_for, walk, write_file
from tests.members import Member

LARGE = 3 << 20         # large enough that copies are confirmed by samples only
TIME = 1600000000 * 10 ** 9 + 123456789


def overwrite(path, data, time_of=None):
    """New content of the same size in the same inode, with the times of before."""
    info = os.stat(path)
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(info.st_mtime_ns, info.st_mtime_ns))


def hide_a_change(path):
    """Changes one byte where, of 8 samples of 16 KiB in 3 MiB, hardly any looks: 1 in 24 that one does."""
    data = bytearray(read_file(path))
    data[len(data) // 2] ^= 0xff
    overwrite(path, bytes(data))


def put(path, data):
    """A file as a package manager lays it down: a new one, renamed into place, with the archive's time."""
    with open(path + ".new", "wb") as file:
        file.write(data)
    os.utime(path + ".new", ns=(TIME, TIME))
    os.rename(path + ".new", path)


class ProofTest(Case):
    """A source on s for each story, and a backup on each of the other hosts, with all files."""

    maxDiff = 2000
    hosts = "a"
    sources = {}

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", *cls.hosts, replicas=len(cls.hosts))
        for name, files in cls.sources.items():
            c.source(name, "s", files)
        for host in cls.hosts:
            c.backup("b" + host, host, size="1G")
        cls.begin()
        c.start()
        cls.prove()

    @classmethod
    def begin(cls):
        """What is old enough to be read is proven at the first look."""
        cls.wait_till_old(cls.c)

    @staticmethod
    def wait_till_old(c):
        for source in c.sources.values():
            wait_for(lambda: not any(cbackup.is_fresh(info) for _, _, info in walk(source.path)), 20, "always fresh")

    def story(self, name):
        self.name, self.source = name, self.c.sources[name].path

    @classmethod
    def said(cls, c=None):
        """What the server says of its sources."""
        c = c or cls.c
        with Member(c, next(iter(c.backups)), None) as member:
            return member.ask("status")["sources"]

    @classmethod
    def unproven(cls, c=None):
        return sum(facts["unproven_files"] for facts in cls.said(c).values())

    @classmethod
    def prove(cls, c=None, order=None):
        """Passes, and waiting for the server's reading, until all is proven and settled."""
        c = c or cls.c

        def settled():
            quiet = all([r.rc == 0 and r.json["settled"] for r in c.passes(order or cls.hosts)])
            if not cls.unproven(c):
                return quiet
            # What is fresh is read after two seconds: passes do not hasten it.
            cls.wait_till_old(c)
            return wait_for(lambda: cls.unproven(c) == 0, 60, "not proven") is None
        wait_for(settled, 60, "not settled and proven")

    def assertTrue_copies(self, c=None, source=None):
        c = c or self.c
        self.assertEqual(copy_wrong_bytes(c, source or self.name, len(c.backups)), [])


class Inferred(ProofTest):
    """What is inferred from inode, size and time is read."""

    NAMES = ["pkg/%02d" % n for n in range(12)]
    STORIES = "alone", "renamed", "linked", "chmod"
    sources = {"again": {}, "release": {}, "moved": {"one": 5000, "other": 10},
               "edited": dict({name: LARGE for name in STORIES}, back=LARGE), "lost": {"large": LARGE, "small": 1000},
               "disk": dict({"d/%d" % n: 2000 for n in range(30)}, large=1 << 20), "slow": {"f0": 1 << 20, "f1": 1 << 20}}

    @classmethod
    def begin(cls):
        for source in "again", "release":
            cls.lay_down(source, cls.NAMES, "")
        super().begin()

    @classmethod
    def lay_down(cls, source, names, release):
        """A release of a package, as it is unpacked over what is there no more."""
        root = cls.c.sources[source].path
        os.makedirs(os.path.join(root, "pkg"), exist_ok=True)
        for name in names:
            put(os.path.join(root, name), some_bytes(5000, name + release))

    def install_again(self, release):
        """The files are removed and laid down in another order, so that their inodes are given again."""
        for name in self.NAMES:
            os.unlink(os.path.join(self.source, name))
        self.lay_down(self.name, reversed(self.NAMES), release)

    def test_a_package_that_was_installed_again_has_right_copies_and_costs_no_network(self):
        self.story("again")
        self.install_again("")
        result = self.c.client("a")
        self.assertEqual(result.json["copied_files"] + result.json["updated_files"], 0)
        self.assertEqual(result.json["wire_bytes"], 0)
        self.prove()
        self.assertTrue_copies()

    def test_the_next_release_of_a_package_reaches_the_backups(self):
        self.story("release")
        self.install_again(" 2")
        self.prove()
        self.assertTrue_copies()
        restored = self.c.path("restored")
        self.assertEqual(self.c.restore("a", "release", to=restored).rc, 0)
        for n in self.NAMES:
            self.assertEqual(read_file(os.path.join(restored, n)), some_bytes(5000, n + " 2"))

    def test_a_file_under_another_name_with_another_s_inode_size_and_time_is_not_that_file(self):
        """As when one file was deleted and another made: moved copies are compared."""
        self.story("moved")
        path = os.path.join(self.source, "one")
        info = os.stat(path)
        os.rename(path, os.path.join(self.source, "two"))
        overwrite(os.path.join(self.source, "two"), some_bytes(5000, "two"))
        self.assertEqual(os.stat(os.path.join(self.source, "two")).st_ino, info.st_ino)
        self.prove()
        self.assertTrue_copies()

    def test_an_edit_that_keeps_its_time_is_found_whatever_else_happens_to_the_file(self):
        self.story("edited")

        def rename(path):
            os.rename(path, path + " renamed")

        def link(path):
            os.link(path, path + " linked")

        def away_and_back(path):
            away = self.c.path("away")
            os.rename(path, away)
            self.c.client("a")
            hide_a_change(away)
            os.rename(away, path)

        stories = dict(zip(self.STORIES, (None, rename, link, lambda path: os.chmod(path, 0o600))))
        for name, story in stories.items():
            hide_a_change(os.path.join(self.source, name))
            if story:
                story(os.path.join(self.source, name))
        away_and_back(os.path.join(self.source, "back"))
        self.prove()
        self.assertTrue_copies()

    def test_an_edit_that_keeps_its_time_is_found_when_the_books_are_lost_meanwhile(self):
        self.story("lost")
        self.c.stop("s")
        hide_a_change(os.path.join(self.source, "large"))
        shutil.rmtree(os.path.join(self.c.home("s"), "state"))
        self.c.start("s")
        self.prove()
        self.assertTrue_copies()

    def test_a_replaced_source_disk_costs_one_reading_and_no_network(self):
        self.story("disk")
        os.rename(self.source, self.source + " old")
        shutil.copytree(self.source + " old", self.source, symlinks=True)   # as `cp -a`
        result = self.c.client("a")
        self.assertEqual(result.rc, 0, result)
        self.assertEqual(result.json["wire_bytes"], 0)
        self.assertEqual(result.json["moved_files"] + result.json["updated_files"], 0)
        self.prove()
        self.assertTrue_copies()

    def test_reading_goes_on_after_a_restart_and_until_then_nothing_is_called_proven(self):
        """With a rate of 20 KiB a second the first file is being read when the server is killed."""
        self.story("slow")
        c = self.c
        c.keys["read_rate"] = "20K"
        c.write_config()
        c.stop("s")
        for n in range(2):
            os.chmod(os.path.join(self.source, "f%d" % n), 0o600)
        c.start("s")
        wait_for(lambda: self.unproven() == 2, 20, "nothing is presumed")
        c.kill("s")
        c.start("s")
        self.assertEqual(self.unproven(), 2)
        c.keys.pop("read_rate")
        c.write_config()
        c.stop("s")
        c.start("s")
        self.prove()


class Lies(ProofTest):
    """Copies that are not what they are said to be."""

    hosts = "ab"
    sources = {"stale": {"large": LARGE, "small": 100}, "older": {"old name": 3000, "new name": 4000}}

    def test_a_first_copy_that_was_damaged_on_its_way_does_not_outlive_the_proof(self):
        c = self.cluster("s", "a", "b", "d", replicas=3)
        self.source = c.source("docs", "s", {"large": LARGE})
        for host in "abd":
            c.backup("b" + host, host, size="1G")
        c.start()
        self.damage(c, "a")
        self.prove(c, "bda")        # true copies come while the wrong digest is the only one
        self.assertTrue_copies(c, "docs")
        self.assertEqual(c.run("a", "verify").rc, 0)

    def damage(self, c, host):
        """A pass in which a file is changed between its arrival and its digest, where no sample looks."""
        client = c.spawn(host, "client", CBACKUP_TEST_KILL="copied")
        client.wait()
        backup = c.backups["b" + host].path
        staged = os.path.join(backup, ".cbackup", "incoming", "docs", "large")
        self.assertTrue(os.path.exists(staged))
        hide_a_change(staged)
        # the digest is that of the damaged file, as after a bad memory: what is fetched again is compared by rsync only
        code = "cbackup.Rsync.fetch = lambda *a, **k: cbackup.Pull()"
        for _ in range(20):     # a sample may meet the byte: the copy is refused then for a day, as it should be
            if not os.path.exists(staged):
                c.advance(25 * 3600)
                os.makedirs(os.path.dirname(staged), exist_ok=True)     # a refused copy goes with its directory
                shutil.copy2(os.path.join(self.source, "large"), staged)
                hide_a_change(staged)
            result = c.client(host, CBACKUP_TEST_BEFORE=code)
            if os.path.exists(os.path.join(backup, "docs", "large")):
                return
        self.fail("the damaged copy was never taken: %s" % result)

    def test_a_stale_disk_that_reports_first_to_new_books_does_not_outlive_the_proof(self):
        self.story("stale")
        c, stale = self.c, self.c.backups["ba"].path
        shutil.copytree(stale, stale + " old", symlinks=True)
        hide_a_change(os.path.join(self.source, "large"))
        self.prove()
        c.stop("s")
        shutil.rmtree(stale)
        os.rename(stale + " old", stale)
        shutil.rmtree(os.path.join(c.home("s"), "state"))
        c.start("s")
        self.prove()
        self.assertTrue_copies()

    def test_an_older_state_of_a_disk_with_another_file_at_the_new_name_is_no_copy(self):
        self.story("older")
        disk = self.c.backups["ba"].path
        shutil.copytree(disk, disk + " old", symlinks=True)
        os.unlink(os.path.join(self.source, "new name"))
        self.prove()
        os.rename(os.path.join(self.source, "old name"), os.path.join(self.source, "new name"))
        self.c.passes("b")       # the server knows of the rename, a has not carried it out
        shutil.rmtree(disk)
        os.rename(disk + " old", disk)
        self.prove()
        self.assertTrue_copies()


class MassChange(ProofTest):
    """What is found by reading is subject to the rule of mass changes, too."""

    FILES = {"f%02d" % n: 1000 for n in range(24)}
    sources = {"all": FILES, "back": FILES, "half": FILES}

    def spoil(self, count):
        self.before = {name: read_file(self.c.kept_as("ba", self.name, name)) for name in self.FILES}
        for name in sorted(self.FILES)[:count]:
            overwrite(os.path.join(self.source, name), some_bytes(1000, "spoiled " + name))

    def state(self, c=None, source=None):
        return self.said(c)[source or self.name]["state"]

    def test_an_overwrite_of_everything_that_keeps_times_is_held(self):
        self.story("all")
        c = self.c
        self.spoil(24)
        self.assertEqual(c.client("a").rc, 1)
        self.assertEqual(self.state(), "held")
        for name, data in self.before.items():
            self.assertEqual(read_file(c.kept_as("ba", "all", name)), data)
        self.assertEqual(c.client("a").rc, 1)       # another scan does not let go of it
        listed = ["f%02d has changed" % n for n in range(24)]
        self.assertEqual(listed, [line.strip() for line in c.run("a", "status", "-v").stdout.splitlines()
                                  if line.endswith("has changed")])
        self.assertEqual(c.run("a", "accept", "all").rc, 0)
        self.prove()
        self.assertTrue_copies()

    def test_when_the_files_are_back_it_is_held_no_longer(self):
        self.story("back")
        self.spoil(24)
        self.c.client("a")
        self.assertEqual(self.state(), "held")
        for name, data in self.before.items():
            overwrite(os.path.join(self.source, name), data)
        self.c.client("a")
        self.prove()
        self.assertEqual(self.state(), "ok")
        self.assertTrue_copies()

    def test_half_of_the_files_are_changes_like_others(self):
        self.story("half")
        self.spoil(12)
        self.prove()
        self.assertEqual(self.state(), "ok")
        self.assertTrue_copies()

    def test_consent_is_for_one_scan_however_it_ends(self):
        c = self.cluster("s", "a", replicas=1)
        self.name, self.source = "docs", c.source("docs", "s", self.FILES)
        c.backup("ba", "a", size="1G")
        c.start()
        self.prove(c)
        c.stop("s")
        kept = self.source + " kept"
        os.rename(self.source, kept)
        os.mkdir(self.source)
        c.start("s")
        c.client("a")
        self.assertEqual(self.state(c), "held")
        c.kill("s")
        os.rmdir(self.source)
        shutil.copytree(kept, self.source)
        for name in sorted(self.FILES)[:20]:
            os.unlink(os.path.join(self.source, name))
        c.servers["s"] = c.spawn("s", "server", CBACKUP_TEST_KILL="scan-half:1")
        c._wait_ready("s")
        wait_for(lambda: self.state(c) == "held", 20, "not held")
        self.assertEqual(c.run("a", "accept", "docs").rc, 1)        # the server dies in the middle of it
        c.servers.pop("s").wait()
        for name in sorted(self.FILES)[20:]:
            os.unlink(os.path.join(self.source, name))
        os.rename(self.source, self.source + " unmounted")
        os.mkdir(self.source)
        c.start("s")
        c.client("a")
        self.assertEqual(self.state(c), "held")
        self.assertTrue(os.path.exists(c.kept_as("ba", "docs", sorted(self.FILES)[23])))


class FreshTest(unittest.TestCase):
    """A file that has just been changed may be changed again without that its times show it."""

    @contextlib.contextmanager
    def file(self):
        """(tree, path, what the books would say) of a file that was written just now."""
        with tempfile.TemporaryDirectory() as base, cbackup.Tree(base) as tree:
            path = os.path.join(base, "f")
            write_file(path, "one")
            info = os.stat(path)
            yield tree, path, {"path": b"f", "size": 3, "mtime": info.st_mtime_ns, "ino": info.st_ino,
                               "ctime": info.st_ctime_ns, "digest": None, "doubt": None}

    def test_a_file_is_read_as_a_proof_only_when_its_times_are_old_enough(self):
        with self.file() as (tree, path, facts):
            self.assertEqual(cbackup.read_own(tree, facts, cbackup.Pace(None)), ("fresh", None))
            wait_for(lambda: cbackup.read_own(tree, facts, cbackup.Pace(None))[0] == "read", 5, "always fresh")

    def test_a_file_that_is_another_before_or_after_the_reading_proves_nothing(self):
        with self.file() as (tree, path, facts):

            def read_and_edit(descriptor, pace, size):
                write_file(path, "two")
                return b"digest", 3
            with mock.patch.multiple(cbackup, is_fresh=lambda info: False, digest_descriptor=read_and_edit):
                self.assertEqual(cbackup.read_own(tree, dict(facts, mtime=1), cbackup.Pace(None)), ("changed", None))
                self.assertEqual(cbackup.read_own(tree, facts, cbackup.Pace(None)), ("changed", None))

    def test_what_is_read_to_compare_a_copy_proves_only_when_its_times_are_old_enough(self):
        with self.file() as (tree, _, facts):
            digest = hashlib.blake2b(b"one", digest_size=32).digest()
            given = {"path": b"f", "size": 3, "digest": digest, "offsets": [], "samples": b""}
            for fresh, own in ((True, None), (False, digest)):
                with mock.patch.object(cbackup, "is_fresh", lambda info: fresh):
                    self.assertEqual(cbackup.compare_own(tree, facts, given), ("ok", own))

    def test_what_is_proven_is_not_read_again_for_a_copy_that_has_its_digest(self):
        with self.file() as (tree, path, facts):
            digest = hashlib.blake2b(b"one", digest_size=32).digest()
            facts.update(digest=digest)
            given = {"path": b"f", "size": 3, "digest": digest, "offsets": [], "samples": b""}
            with mock.patch.object(cbackup, "is_fresh", lambda info: False):
                with mock.patch.object(cbackup, "digest_descriptor", side_effect=AssertionError("it is read")):
                    self.assertEqual(cbackup.compare_own(tree, facts, given), ("ok", None))
                    with self.assertRaises(AssertionError):
                        cbackup.compare_own(tree, dict(facts, doubt=1.0), given)
                self.assertEqual(cbackup.compare_own(tree, facts, dict(given, digest=b"x" * 32)), ("bad", digest))
            write_file(path + "2", "two")
            os.utime(path + "2", ns=(facts["mtime"], facts["mtime"]))
            os.rename(path + "2", path)
            self.assertEqual(cbackup.compare_own(tree, facts, given), ("changed", None))
            os.unlink(path)
            self.assertEqual(cbackup.compare_own(tree, facts, given), ("changed", None))

    def test_where_times_are_whole_seconds_it_takes_longer(self):
        class Info:
            def __init__(self, age, fraction):
                now = int(time.time() - age)
                self.st_ctime, self.st_ctime_ns = now + fraction / 1e9, now * 10 ** 9 + fraction
        self.assertTrue(cbackup.is_fresh(Info(1, 0)))
        self.assertFalse(cbackup.is_fresh(Info(4, 0)))
        self.assertFalse(cbackup.is_fresh(Info(3, 500000000)))
        self.assertFalse(cbackup.is_fresh(Info(-3600, 0)))      # the clock was set back: no change can have that time


class PowerCutTest(unittest.TestCase):

    def test_the_version_before_is_no_bad_copy_of_the_one_that_did_not_become_durable(self):
        """Confirmed, renamed, and the power failed: the old version is at its place again, the new one nowhere."""
        with tempfile.TemporaryDirectory() as base:
            vault = cbackup.Vault(cbackup.Backup("b", "h", base, size=1 << 30), "cluster")
            self.addCleanup(vault.close)
            os.makedirs(os.path.join(base, "docs"))
            place = os.path.join(base, "docs", "f")
            write_file(place, "old")
            old, new = (cbackup.new_digest() for _ in range(2))
            old.update(b"old")
            new.update(b"new")
            vault.hold("docs", b"f", 3, os.stat(place).st_mtime_ns, old.digest(), 0.0)
            vault.expect("docs", "books", [cbackup.Wanted(b"f", 3, 1, 0o644, 0, 0, 2)])
            vault.plan_places("docs", [(b"f", new.digest())])
            vault.recover()
            self.assertEqual(read_file(place), b"old")
            self.assertEqual(vault.held("docs", b"f")[2], old.digest())
            self.assertEqual(vault.rows("SELECT * FROM coming"), [])
            self.assertEqual(vault.rows("SELECT * FROM attic"), [])
            # but what is neither of both is set aside
            vault.expect("docs", "books", [cbackup.Wanted(b"f", 3, 1, 0o644, 0, 0, 2)])
            vault.plan_places("docs", [(b"f", new.digest())])
            write_file(place, "???")
            vault.recover()
            self.assertFalse(os.path.exists(place))
            self.assertIsNone(vault.held("docs", b"f"))


class Grants(unittest.TestCase):
    """The server's decisions in this process, without a reader that would prove what is asked about."""

    CONFIG = """[cluster]
    replicas = 1
    [sources]
    docs = s:%s
    [backups]
    ba = a:/ba size=1G
    bb = b:/bb size=1G
    """

    def test_what_is_only_presumed_grants_no_drop(self):
        with tempfile.TemporaryDirectory() as base:
            path = os.path.join(base, "docs")
            os.mkdir(path)
            write_file(os.path.join(path, "large"), some_bytes(LARGE, "large"))
            config = cbackup.parse_config(self.CONFIG % path)
            books = cbackup.Books(os.path.join(base, "books.db"), "s")
            books.configure(config)
            cbackup.run_scan(books, config.sources["docs"])
            row = books.source_row("docs")
            facts = books.version_of(row["id"], b"large")
            digest = cbackup.new_digest()
            digest.update(some_bytes(LARGE, "large"))
            for name in ("ba", "bb"):
                number = books.backup_id(name)
                self.assertEqual(books.record_check(number, row, [(facts["id"], facts["version"], digest.digest())]),
                                 [facts["id"]])
                self.assertEqual(books.count_copies(number, row["id"], [(b"large", facts["version"], 1)]), [b"large"])
            self.assertEqual(books.figures(row)["copies"], {"2": 1})
            self.assertEqual(books.grant_drop(books.backup_id("ba"), row, [b"large"]), [])
            with cbackup.Tree(path) as tree:
                wait_for(lambda: cbackup.read_own(tree, facts, cbackup.Pace(None))[0] == "read", 5, "always fresh")
                own = cbackup.read_own(tree, facts, cbackup.Pace(None))[1]
            self.assertEqual(books.prove_all(row, [(facts, own, False)]), ["proven"])
            self.assertEqual(books.grant_drop(books.backup_id("ba"), row, [b"large"]), [b"large"])
            self.assertEqual(books.grant_drop(books.backup_id("bb"), row, [b"large"]), [])
            books.close()


if __name__ == "__main__":
    unittest.main()
