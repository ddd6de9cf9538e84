"""Catalogs: every backup knows what each source consisted of, now and at each kept time, and that costs little."""

import base64
import os
import random
import shutil
import time
import unittest

from tests.faults import Proxy
from tests.harness import DIRECTORY, Case, Link, inodes, make_tree, some_bytes, tree, write_file

DAY = 86400


def catalogs(cluster, backup, source="docs"):
    """{name: size} of the catalog files that a backup keeps of a source."""
    directory = os.path.join(cluster.backups[backup].path, ".cbackup", "catalog", source)
    return {name: os.path.getsize(os.path.join(directory, name)) for name in os.listdir(directory)} \
        if os.path.isdir(directory) else {}


class CatalogsCostLittleTest(Case):
    """Nothing changed: nothing is written; little changed: little is sent and written, whatever the source's size."""

    FILES = 320
    NAMES = ["d%02d/file %s.jpg" % (n % 40, some_bytes(90, n).hex()) for n in range(FILES)]     # long ones: they make the list

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=1)
        cls.source = cls.c.source("docs", "s", {name: b"%d" % n for n, name in enumerate(cls.NAMES)})
        cls.c.backup("ba", "a", "9M")
        cls.c.backup("bb", "b", "9M")
        cls.c.backup("bs", "s", "9M")
        cls.c.start()
        cls.proxy = Proxy(cls.c.ports["s"])
        cls.addClassCleanup(cls.proxy.close)
        cls.c.ports["s"], own = cls.proxy.port, cls.c.ports["s"]
        cls.c.write_config("a", "b")    # they reach s through the proxy, which counts
        cls.c.ports["s"] = own
        cls.c._written = cls.c.config()
        cls.settle()

    @classmethod
    def settle(cls):
        cls.c.settle([["a", "b", "s"]])
        cls.c.passes("abs")

    def sent_by(self, *hosts):
        before = self.proxy.passed
        for host in hosts:
            self.assertRc(0, self.c.client(host))
        return self.proxy.passed - before

    def test_every_backup_has_the_catalogs_of_every_source(self):
        for backup in self.c.backups:
            self.assertTrue(catalogs(self.c, backup), "%s has no catalog" % backup)

    def test_each_of_them_alone_is_enough_to_say_what_is_missing(self):
        # bs is on the source's own host: it holds nothing of it.
        result = self.c.restore("a", "docs", "d07", to=self.c.path("of bs"),
                                options=["--json", "--from", self.c.backups["bs"].path])
        self.assertEqual(self.FILES // 40, result.json["files"])

    def test_an_unchanged_source_costs_no_catalog(self):
        before = [inodes(os.path.join(backup.path, ".cbackup", "catalog")) for backup in self.c.backups.values()]
        self.c.advance(DAY)
        sent = self.sent_by("a", "b", "s", "a", "b")
        self.assertEqual(before, [inodes(os.path.join(backup.path, ".cbackup",
                                                      "catalog")) for backup in self.c.backups.values()])
        self.assertLess(sent, 60000, "bytes that the server sent for four passes without anything to do")

    def test_a_small_change_does_not_send_or_write_the_whole_list(self):
        whole = max(catalogs(self.c, "ba").values())
        self.assertGreater(whole, 30000, "not a test: the list is small")
        for number in self.todays(range(2), 1):
            before = {backup: catalogs(self.c, backup) for backup in self.c.backups}
            idle = self.sent_by("a", "b", "s")
            write_file(os.path.join(self.source, self.NAMES[number]), "changed")
            sent = self.sent_by("a", "b", "s", "a", "b", "s")
            self.assertLess(sent - 2 * idle, whole / 3, "bytes that the server sent")
            for backup, had in before.items():
                now = catalogs(self.c, backup)
                self.assertEqual(had, {name: size for name, size in now.items() if name in had}, "rewritten in %s" % backup)
                new = {name: size for name, size in now.items() if name not in had}
                self.assertTrue(new, "%s did not hear of the change" % backup)
                self.assertLess(sum(new.values()), whole / 20, new)


class BackInTimeTest(Case):
    """Any kept time comes back exactly as it was then, however the time is written."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=1, keep="20d")
        cls.source = source = cls.c.source("docs", "s", {
            "f": b"version 1", "deleted": b"last words", "moved": b"moved", "stay": b"stay", "d/inner": b"inner",
            "d/deep/x": b"x",
            "link": Link("f"), "kind": b"a file", "closed/f": b"1", "void": DIRECTORY, "swap 1": b"one", "swap 2": b"two",
            "notes/a.txt": b"a", "notes/b.txt": b"b", "notes/c.md": b"c"})
        cls.c.backup("ba", "a", "9M")
        cls.c.backup("bb", "b", "9M")
        os.chmod(os.path.join(source, "closed"), 0o750)
        os.utime(os.path.join(source, "link"), ns=(1, 1234567890987654321), follow_symlinks=False)
        cls.c.start()
        cls.trees, cls.times = [], []
        cls.keep_time()
        write_file(os.path.join(source, "f"), "version 2")
        os.unlink(os.path.join(source, "deleted"))
        os.rename(os.path.join(source, "moved"), os.path.join(source, "moved on"))
        for old, new in (("swap 1", "swap 3"), ("swap 2", "swap 1"), ("swap 3", "swap 2")):
            os.rename(os.path.join(source, old), os.path.join(source, new))
        shutil.rmtree(os.path.join(source, "d"))
        for name in ("link", "kind", "notes/a.txt"):
            os.unlink(os.path.join(source, name))
        os.rmdir(os.path.join(source, "void"))
        make_tree(source, {"d": Link("else"), "kind/f": b"now a directory", "link": Link("stay"), "void": b"now a file"})
        os.chmod(os.path.join(source, "closed"), 0o700)
        cls.keep_time()
        write_file(os.path.join(source, "f"), "version 3")
        os.chmod(os.path.join(source, "stay"), 0o600)
        cls.keep_time()
        cls.c.advance(-DAY)     # it is the fifth day: 0, 2 and 4 were kept

    @classmethod
    def keep_time(cls):
        cls.c.settle([["a", "b"]])
        cls.trees.append(tree(cls.source))
        cls.times.append(time.time() + cls.c.now)
        cls.c.advance(2 * DAY)

    def restored(self, at, *paths, rc=0):
        to = os.path.join(self.directory(), "to")
        result = self.c.restore("a", "docs", *paths, to=to, options=["--at", at])
        self.assertRc(rc, result)
        return to, result

    def test_the_times_differ(self):
        for one, other in ((0, 1), (1, 2)):
            self.assertNotEqual(self.trees[one], self.trees[other])

    def test_every_form_of_a_time(self):
        forms = {"4d": 0, "96h": 0, "2d": 1, "yesterday": 2, "today": 2}
        for number, form in enumerate(("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M", "%Y-%m-%d", "%Y-%m-%d %H:%M:%S")):
            forms[time.strftime(form, time.localtime(self.times[number % 2] + DAY))] = number % 2
        for at, number in self.todays(forms.items(), 2):
            with self.subTest(at=at):
                to, result = self.restored(at)
                self.assertSameTree(self.trees[number], to)
                self.assertEqual("", result.stderr)

    def test_parts_of_then(self):
        for paths, names in self.todays(((["deleted"], {"deleted"}), (["d"], {"d", "d/inner", "d/deep", "d/deep/x"}), (["kind"], {"kind"}),
                             (["notes/*.txt"], {"notes", "notes/a.txt", "notes/b.txt"}), (["moved", "link"], {"moved", "link"}),
                             (["swap ?"], {"swap 1", "swap 2"}), (["*.md", "void"], {"notes", "notes/c.md", "void"})), 2):
            with self.subTest(paths=paths):
                to, _ = self.restored("4d", *paths)
                self.assertSameTree({name: self.trees[0][name] for name in names}, to)

    def test_what_was_not_there_yet_is_named(self):
        _, result = self.restored("4d", "moved on", rc=1)
        self.assertOneError(result, "moved on")

    def test_what_is_no_time_is_an_error_of_usage(self):
        for at in ("tomorrowish", "2026-13-01", "2026-02-30", "3x", "11/01/2026", "2026-11-01 25:00", "", "1.5d",
                   "9" * 400 + "d"):
            with self.subTest(at=at[:20]):
                self.assertOneError(self.restored(at, rc=2)[1], "2026-11-01")

    def test_a_time_before_the_first_catalog_is_a_clear_error_that_leaves_nothing_behind(self):
        for at in ("30d", "1970-01-02", "0001-01-01"):
            with self.subTest(at=at):
                to, result = self.restored(at, rc=1)
                self.assertOneError(result, "docs")
                self.assertFalse(os.path.exists(to) and os.listdir(to))
        # Where the source is, and is well, it must not be held for that.
        self.assertRc(1, self.c.restore("s", "docs", options=["--at", "30d"]))
        self.assertFalse(os.path.lexists(os.path.join(self.source, ".cbackup-restore")))


class CatalogsEndTest(Case):
    """Catalogs are kept as long as `keep` says, and then pruned."""

    def test_old_catalogs_are_pruned_when_keep_is_over(self):
        cluster = self.cluster("s", "a", replicas=1, keep="10d")
        source = cluster.source("docs", "s", {"f%d" % number: 100 for number in range(5)})
        cluster.backup("ba", "a", "9M")
        cluster.start()
        trees = []
        generator = random.Random(1)
        for day in range(5):
            write_file(os.path.join(source, "f0"), "day %d" % day)
            if day == 2:    # so much news that a new whole catalog is worth it
                make_tree(source, {"l%d" % number: Link(base64.urlsafe_b64encode(
                    generator.getrandbits(24480).to_bytes(3060, "little"))) for number in range(360)})
            cluster.settle()
            trees.append(tree(source))
            cluster.advance(DAY)
        whole = sorted(name for name in catalogs(cluster, "ba") if name.startswith("0" * 12 + "-"))
        self.assertGreater(len(whole), 1, "not a test: there is only one whole catalog: %s" % sorted(catalogs(cluster, "ba")))
        everything = catalogs(cluster, "ba")
        for day in (0, 3):
            to = cluster.path("day %d" % day)
            self.assertRc(0, cluster.restore("a", "docs", "f0", to=to, options=["--at", "%dh" % (24 * (5 - day) - 12)]))
            self.assertEqual(trees[day]["f0"], tree(to)["f0"])
        cluster.advance(4 * DAY)
        cluster.client("a")
        self.assertEqual(everything, catalogs(cluster, "ba"), "pruned before its time")
        cluster.advance(7 * DAY + 3600)      # the newest catalog is older than `keep`: it alone is needed
        self.assertRc(0, cluster.client("a"))
        self.assertLess(sum(catalogs(cluster, "ba").values()), sum(everything.values()))
        self.assertFalse(set(whole[:1]) & set(catalogs(cluster, "ba")))
        self.assertRc(0, cluster.restore("a", "docs", to=cluster.path("now")))
        self.assertSameTree(trees[-1], cluster.path("now"))
        self.assertOneError(cluster.restore("a", "docs", to=cluster.path("too old"), options=["--at", "15d"]), "docs")


if __name__ == "__main__":
    unittest.main()
