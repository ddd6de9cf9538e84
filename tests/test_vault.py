"""A backup's directory: what is taken for one, who may look into it, and what happens to old versions in it."""

import contextlib
import os
import stat
import unittest
import unittest.mock

import cbackup
from tests.harness import (Case, Link, Process, inodes, make_tree, quick_program, read_file, tree, wait_for, walk,
                           write_file)

DAY = 86400.0


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
        self.c.start("s")
        self.assertRc(0, self.c.client("a"))
        self.assertCopies(self.c, "docs", 1)

    def test_what_a_first_pass_that_was_cut_off_has_left_is_nothing(self):
        os.mkdir(os.path.join(self.kept, ".cbackup"))
        write_file(os.path.join(self.kept, ".cbackup", "identity.4711.new"), "{")
        self.c.start("s")
        self.assertRc(0, self.c.client("a"))
        self.assertCopies(self.c, "docs", 1)


class VaultCase(Case):
    """A backup without a cluster."""

    SIZE = 1 << 20

    def setUp(self):
        self.base = self.directory()
        self.kept = os.path.join(self.base, "backup")
        self.vault = self.open()

    def open(self, **options):
        vault = cbackup.Vault(cbackup.Backup("b1", "a", self.kept, size=self.SIZE), "cluster", **options)
        self.addCleanup(vault.close)
        return vault

    def hold(self, source, *names, size=1000):
        """Copies, as if they had come by a pass."""
        make_tree(os.path.join(self.kept, source), {name: size for name in names})
        for name in names:
            path = os.path.join(self.kept, source, name)
            with open(path, "rb") as file:
                digest = cbackup.digest_descriptor(file.fileno())[0]
            self.vault.hold(source, name.encode(), size, os.stat(path).st_mtime_ns, digest, cbackup.clock.now())

    def retire(self, source, *names):
        self.vault.set_aside(source, [name.encode() for name in names], "deleted")

    def old(self):
        """The paths of all old versions that are on the disk."""
        found = []
        for folder, _, names in os.walk(os.path.join(self.kept, ".cbackup", "attic")):
            found += names
        return sorted(found)

    @contextlib.contextmanager
    def later(self, seconds):
        """The clock that tests can set."""
        now = cbackup.clock.now
        with unittest.mock.patch.object(cbackup.clock, "now", lambda: now() + seconds):
            yield


class OldVersionsTest(VaultCase):
    """What goes from the attic, and what never does."""

    def setUp(self):
        super().setUp()
        self.hold("docs", "a", "b", "c")
        self.hold("held", "x", "y")
        self.retire("docs", "a", "b", "c")
        self.retire("held", "x", "y")

    def test_no_copy_is_deleted_without_a_grant_for_it(self):
        self.hold("docs", "kept")
        for grant in (None, cbackup.Grant("docs", b"other")):
            with self.assertRaises(AssertionError):
                self.vault.delete(b"docs/kept", grant)
        self.assertTrue(os.path.exists(os.path.join(self.kept, "docs", "kept")))

    def test_those_of_a_held_source_do_not_expire(self):
        self.vault.keep_old(["held"], False)
        with self.later(365 * DAY):
            self.vault.expire_attic(30 * DAY)
            self.assertEqual(["x", "y"], self.old())
            self.assertEqual(2000, self.vault.attic_bytes())
            self.vault.keep_old([], False)
            self.vault.expire_attic(30 * DAY)
        self.assertEqual([], self.old())

    def test_those_of_a_held_source_give_no_room_and_count_as_none(self):
        self.assertEqual(self.SIZE, self.vault.free())
        self.vault.keep_old(["held"], False)
        self.assertEqual(self.SIZE - 2000, self.vault.free())
        self.assertEqual((3, 3000), self.vault.make_room(self.SIZE, keep=DAY))
        self.assertEqual(["x", "y"], self.old())
        self.vault.keep_old([], False)
        self.vault.make_room(self.SIZE - 1000)
        self.assertEqual(["y"], self.old())     # no more than is needed

    def test_with_a_wrong_clock_nothing_expires(self):
        self.vault.keep_old([], True)
        with self.later(365 * DAY):
            self.vault.expire_attic(30 * DAY)
        self.assertEqual(["a", "b", "c", "x", "y"], self.old())

    def test_what_came_while_the_clock_was_ahead_is_kept_no_longer_than_the_rest(self):
        self.hold("docs", "future")
        with self.later(365 * DAY):
            self.retire("docs", "future")
        self.vault.expire_attic(30 * DAY)
        with self.later(31 * DAY):
            self.vault.expire_attic(30 * DAY)
        self.assertEqual([], self.old())


class HeldTest(Case):
    """Held means held: in the backups nothing of it goes, however long, whatever room is wanted, whoever is down."""

    def test_the_attic_of_a_held_source_stays_until_it_is_accepted(self):
        c = self.cluster("s", "t", "a", replicas=1)
        docs = c.source("docs", "s", {"f%02d" % n: 1000 for n in range(30)})
        c.backup("b1", "a", "100K")
        c.start("s", "t")
        self.assertRc(0, c.client("a"))
        write_file(os.path.join(docs, "f00"), "new")
        self.assertRc(0, c.client("a"))
        self.assertEqual(1, len(c.attic("b1", "docs")))
        for n in range(30):
            os.unlink(os.path.join(docs, "f%02d" % n))
        self.assertIn("held", c.client("a").stderr)
        c.advance(60 * DAY)
        c.client("a")
        c.stop("s")         # a host that cannot be asked any more changes nothing
        c.client("a")
        c.source("more", "t", {"large": 75 << 10})      # no room for it beside what is held
        c.client("a")
        self.assertEqual(1, len(c.attic("b1", "docs")))
        c.start("s")
        self.assertRc(0, c.run("s", "accept", "docs"))
        c.client("a")
        c.advance(60 * DAY)
        c.client("a")
        self.assertEqual([], c.attic("b1", "docs"))


class WrongClockTest(Case):
    """A host whose clock is a year ahead says so, and deletes no old version and no catalog until it is right again."""

    def test_a_clock_a_year_ahead_on_one_host(self):
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", {"f": "1", "g": "1"})
        kept = c.backup("b1", "a", "9M")
        c.start("s")
        self.assertRc(0, c.client("a"))
        for number in range(3):
            write_file(os.path.join(source, "f"), "version %d" % number)
            self.assertRc(0, c.client("a"))
        ahead = c.path("ahead")
        write_file(ahead, "%d\n" % (365 * DAY))
        catalogs = os.listdir(os.path.join(kept, ".cbackup", "catalog", "docs"))
        for _ in range(2):
            result = c.client("a", CBACKUP_TEST_CLOCK=ahead)
            self.assertRc(1, result)
            self.assertOneError(result, "clock", "ahead of that of s")
        write_file(os.path.join(source, "g"), "while the clock was wrong")
        c.client("a", CBACKUP_TEST_CLOCK=ahead)
        self.assertEqual(4, len(c.attic("b1", "docs")))
        self.assertLessEqual(set(catalogs), set(os.listdir(os.path.join(kept, ".cbackup", "catalog", "docs"))))
        self.assertRc(0, c.client("a"))
        c.advance(31 * DAY)     # what came then is kept for as long as everything else
        c.client("a")
        self.assertEqual([], c.attic("b1", "docs"))


class ManyBadCopiesTest(Case):
    """However many copies are gone, one `verify` finds them all."""

    def test_verify_goes_on_past_pages_of_bad_copies(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f%03d" % n: b"%d" % n for n in range(500)})
        c.backup("b1", "a", "9M")
        c.start("s")
        self.assertRc(0, c.client("a"))
        for n in range(450):
            os.unlink(c.kept_as("b1", "docs", "f%03d" % n))
        verify = c.run("a", "verify")
        self.assertRc(1, verify)
        self.assertEqual(450, sum("is gone" in line for line in verify.error_lines), verify.stderr[:2000])
        self.assertRc(0, c.client("a"))
        self.assertCopies(c, "docs", 1)


class PrivateTest(Case):
    """What lies in a backup is for nobody else, and nothing in it runs as somebody else."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"d/program": "#!/bin/sh", "d/shared": "2", "plain": "3"})
        cls.modes = {"d/program": 0o4755, "d/shared": 0o2775, "d": 0o3777, "": 0o755, "plain": 0o644}
        for name, mode in cls.modes.items():
            os.chmod(os.path.join(cls.source, name), mode)
        cls.kept = c.backup("b1", "a", "9M")
        c.start()
        c.settle()

    def mode(self, *names):
        return stat.S_IMODE(os.lstat(os.path.join(self.kept, *names)).st_mode)

    def test_directories_and_databases_are_closed_whatever_the_umask(self):
        c = self.cluster("s", "a", "b", replicas=2)
        c.source("docs", "s", {"f": "1"})
        kept = {host: c.backup("b" + host, host, "9M") for host in "ab"}
        c.start("s")
        for host, umask in (("a", 0), ("b", 0o022)):
            os.makedirs(os.path.join(kept[host], "lost+found"))
            self.assertRc(0, Process(quick_program("--home", c.home(host), "client"), c.environment(host), c.path(host),
                                     umask=umask).wait())
            for name, mode in (("docs", 0o700), (".cbackup", 0o700), (".cbackup/backup.db", 0o600)):
                self.assertEqual(mode, stat.S_IMODE(os.stat(os.path.join(kept[host], name)).st_mode), name)
            self.assertNotEqual(0o700, stat.S_IMODE(os.stat(os.path.join(kept[host], "lost+found")).st_mode))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(os.path.join(c.home("s"), "state", "books.db")).st_mode))

    def test_those_that_were_open_are_mended(self):
        for name in ("docs", ".cbackup", ".cbackup/backup.db"):
            os.chmod(os.path.join(self.kept, name), 0o755)
        os.chmod(os.path.join(self.kept, "docs/d/program"), 0o4755)
        self.assertRc(0, self.c.client("a"))
        self.assertEqual([0o700, 0o700, 0o600], [self.mode(name) for name in ("docs", ".cbackup", ".cbackup/backup.db")])
        self.assertRc(0, self.c.run("a", "verify"))
        self.assertEqual(0o755, self.mode("docs/d/program"))

    def test_no_copy_has_setuid_setgid_or_sticky_and_nothing_churns(self):
        for name, mode in self.modes.items():
            self.assertEqual(mode & 0o777 if name else 0o700, self.mode("docs", name), name)
        before = self.c.kept_inodes("b1")
        os.chmod(os.path.join(self.source, "plain"), 0o4711)     # a mode that changes is told to the backup once
        self.assertRc(0, self.c.client("a"))
        self.assertEqual(0o711, self.mode("docs", "plain"))
        self.assertTrue(self.c.client("a").json["settled"])
        os.chmod(os.path.join(self.source, "plain"), 0o644)
        self.c.settle()
        for arguments in (["client"], ["verify"], ["client"]):
            self.assertRc(0, self.c.run("a", *arguments))
        after = self.c.kept_inodes("b1")
        self.assertEqual({name: info for name, info in before.items() if "plain" not in name},
                         {name: info for name, info in after.items() if "plain" not in name})

    def test_restore_brings_the_modes_back(self):
        to = os.path.join(self.directory(), "to")
        self.assertRc(0, self.c.restore("a", "docs", to=to))
        for name, mode in self.modes.items():
            self.assertEqual(mode, stat.S_IMODE(os.stat(os.path.join(to, name)).st_mode), name)

    def test_the_key_is_never_backed_up_also_when_the_home_lies_inside_a_source(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("all", "s", path=c.path("s"), files={"f": "1"})
        c.backup("b1", "a", "9M")
        os.link(os.path.join(c.home("s"), "cluster.pem"), c.path("s", "another name of it"))
        c.start("s")
        self.assertRc(0, c.client("a"))
        found = {name for name, _, _ in walk(c.kept_as("b1", "all"))}
        self.assertIn("home/cbackup.conf", found)
        self.assertEqual(set(), {name for name in found if "state" in name or "pem" in name or "another" in name})
        key = read_file(os.path.join(c.home("s"), "cluster.pem"))
        for _, path, info in walk(c.backups["b1"].path):
            if stat.S_ISREG(info.st_mode):
                self.assertNotIn(key, read_file(path), path)


class NoLinkTest(Case):
    """Between a look at a name and the use of it another user may lay a symlink there: it is not followed."""

    def test_chmod_does_not_follow_a_link_that_comes_in_between(self):
        base = self.directory()
        make_tree(base, {"tree/f": "1", "outside": "2"})
        os.chmod(os.path.join(base, "outside"), 0o600)
        real, path = os.stat, os.path.join(base, "tree", "f")

        def look(name, **options):
            info = real(name, **options)
            if options.get("dir_fd") is not None:
                with contextlib.suppress(FileExistsError):
                    os.rename(path, path + ".old")
                    os.symlink("../outside", path)
            return info
        with cbackup.Tree(os.path.join(base, "tree")) as tree:
            with unittest.mock.patch("os.stat", look), contextlib.suppress(OSError):
                tree.chmod(b"f", 0o4777)
            self.assertTrue(os.path.islink(path))
            self.assertEqual(0o600, stat.S_IMODE(os.stat(os.path.join(base, "outside")).st_mode))
            tree.chmod(b"f.old", 0)
            tree.chmod(b"f.old", 0o640)
        self.assertEqual(0o640, stat.S_IMODE(os.stat(path + ".old").st_mode))


class LooksTest(Case):
    def test_what_many_paths_are_is_told_in_their_order_and_without_a_look_at_each_below_what_is_missing(self):
        base, looks, real = self.directory(), [], os.stat
        make_tree(base, {"d/f": "1", "d/g": "22", "e": "333", "z/y/x": "4444", "link": Link(b"d")})
        asked = [b"a/1", b"a/2", b"a/3", b"d/f", b"d/none", b"d/g", b"e", b"e/below", b"link/f", b"none", b"z/none/x", b"z/y/x"]

        def look(name, **options):
            looks.append(name)
            return real(name, **options)
        with cbackup.Tree(base) as tree, unittest.mock.patch("os.stat", look):
            each = [info and info.st_size for info in cbackup.stats_of(tree, asked)]
            self.assertEqual([None, None, None, 1, None, 2, 3, None, None, None, None, 4], each)
            self.assertEqual(each, [info and info.st_size for info in map(tree.lstat, asked)])
            del looks[:]
            self.assertFalse(any(cbackup.stats_of(tree, (b"a/%d" % number for number in range(100)))))
            self.assertEqual([b"a"], looks)


class SomeLink:
    """A server that answers nothing but `told`, and not always."""

    def __init__(self):
        self.told = []

    def again(self):
        return self

    def close(self):
        pass

    def peer_level(self):
        return cbackup.LEVEL

    def call(self, op, **fields):
        self.told.append(dict(fields, op=op))
        if len(self.told) % 2:
            raise [KeyError("nonsense"), OSError(5, "an error"), cbackup.ProtocolError("nonsense")][len(self.told) // 2 % 3]
        return {}


class RenewingTest(VaultCase):
    """Claims do not run out while a client is at work, however long it takes."""

    def setUp(self):
        super().setUp()
        self.link = SomeLink()
        config = cbackup.parse_config("[hosts]\ns=1.1.1.1\na=1.1.1.1:2\n[sources]\ndocs=s:/x\n[backups]\nb1=a:%s size=1M\n"
                                      % self.kept)
        self.one = cbackup.Pass(self.vault, config, "a", {"s": self.link}, cbackup.Figures())

    def expect(self, *names):
        self.vault.expect("docs", "b", [cbackup.Wanted(name.encode(), 1000, 1, 0o644, 0, 0, 1) for name in names])

    def test_no_error_ends_the_renewing(self):
        self.expect("new")
        with unittest.mock.patch.object(cbackup, "RENEW_EVERY", 0.001), self.assertLogs("cbackup", "WARNING"):
            with self.one.renewing():
                wait_for(lambda: len(self.link.told) > 9, 10, "nobody is told any more")
        self.assertEqual({"told"}, {words["op"] for words in self.link.told})

    def test_updates_under_way_are_named_and_new_files_are_not(self):
        self.hold("docs", "known")
        self.expect("known", "new")
        self.link.told.append({})
        self.one.renew(self.one.links)
        self.assertEqual([["docs", "known"]], self.link.told[-1]["rows"])

    def test_the_claims_of_a_pass_that_fails_are_given_back_at_once(self):
        self.expect("new", "other")
        self.vault.plan_places("docs", [(b"other", bytes(32))])     # confirmed: the next pass puts it into its place
        self.one.standings["docs"] = cbackup.Standing("docs", "s", None, "b", {"state": "ok"})
        self.link.told.append({})
        with unittest.mock.patch.object(self.one, "prepare", side_effect=OSError(5, "an error")), self.assertRaises(OSError):
            self.one.run()
        released = [words for words in self.link.told if words.get("op") == "release"]
        self.assertEqual([(["new"], False)], [(words["paths"], words["all"]) for words in released])

    def test_passes_that_bring_nothing_do_not_renew_a_claim_for_ever(self):
        make_tree(os.path.join(self.base, "docs"), {"f": "1"})
        source = cbackup.Source("docs", "s", os.path.join(self.base, "docs"), 1)
        books = cbackup.Books(os.path.join(self.base, "books.db"), "s")
        self.addCleanup(books.close)
        books.configure(cbackup.Config(text="", sources={"docs": source}, backups={
            "b1": cbackup.Backup("b1", "a", self.kept, size=self.SIZE)}))
        cbackup.run_scan(books, source)
        number = books.hear("b1", {"first": True, "free": self.SIZE, "capacity": self.SIZE})
        self.assertEqual(1, len(books.claim(number, books.source_row("docs"), self.SIZE, 10, self.SIZE)))
        steady, kept = cbackup.clock.steady, []
        for quarter in range(1, 30):
            with unittest.mock.patch.object(cbackup.clock, "steady", lambda: steady() + quarter * 900):
                books.hear("b1", {"first": True})
                books.expire(10 * DAY)
                kept.append(bool(books.one("SELECT 1 FROM copies")))
        self.assertTrue(all(kept[:cbackup.FRUITLESS_PASSES]), "a file may take several passes")
        self.assertFalse(kept[cbackup.FRUITLESS_PASSES + 5])

    def test_an_update_that_is_named_is_waited_for_and_others_are_not(self):
        make_tree(os.path.join(self.base, "docs"), {"large": "1", "other": "2"})
        source = cbackup.Source("docs", "s", os.path.join(self.base, "docs"), 1)
        books = cbackup.Books(os.path.join(self.base, "books.db"), "s")
        self.addCleanup(books.close)
        spec = cbackup.Backup("b1", "a", self.kept, size=self.SIZE)
        books.configure(cbackup.Config(text="", sources={"docs": source}, backups={"b1": spec}))
        cbackup.run_scan(books, source)
        number, row = books.backup_id("b1"), books.source_row("docs")
        for each in books.rows("SELECT id FROM entries WHERE kind='f'"):
            with books.write() as db:
                db.execute("INSERT INTO copies(file, backup, source, state, expires) VALUES(?,?,?,'s',?)",
                           (each[0], number, row["id"], books.up() + cbackup.STALE_LEASE))
        steady = cbackup.clock.steady
        for hours in (2, 4, 6):
            with unittest.mock.patch.object(cbackup.clock, "steady", lambda: steady() + hours * 3600):
                books.renew_updates(number, [(row["id"], b"large")])
                books.expire(10 * DAY)
        self.assertEqual([(b"large", "s"), (b"other", "o")], books.rows(
            "SELECT e.path, c.state FROM copies c JOIN entries e ON e.id=c.file ORDER BY 1"))


if __name__ == "__main__":
    unittest.main()
