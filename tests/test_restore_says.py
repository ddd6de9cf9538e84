"""What restore and find say, before and after: from whom and when, where to, whether there is room,
what brings it back."""

import contextlib
import io
import json
import os
import shutil
import unittest

import cbackup
from tests.faults import tmpfs_or_skip, unmount
from tests.harness import Case, make_tree, read_file, write_file

FILES = {"f%d" % number: 100000 for number in range(8)}


class SaysCase(Case):
    """A source `docs` on s, with backups on a and b."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.source = cls.c.source("docs", "s", FILES)
        for host in "ab":
            cls.c.backup("b" + host, host, "10M")
        cls.c.start()
        cls.c.settle()


class WhereToTest(SaysCase):
    """Without --to it goes to the source's own path, but only on the source's own host, or what is
    to be it."""

    def test_on_another_machine_it_asks_for_a_place(self):
        self.c.fresh_home("new")
        for host in ("a", "new"):
            result = self.c.restore(host, "docs")
            self.assertRc(2, result)
            self.assertOneError(result, "docs lives on s", "--to DIR", "--host s")
        self.assertFalse(os.path.lexists(os.path.join(self.source, ".cbackup-restore")))

    def test_a_machine_that_is_to_be_the_host_says_so(self):
        self.c.fresh_home("heir")
        os.unlink(os.path.join(self.source, "f3"))
        self.assertRc(0, self.c.run("heir", "--host", "s", "restore", "docs"))
        self.assertTrue(os.path.exists(os.path.join(self.source, "f3")))

    def test_a_dry_run_needs_no_place(self):
        plan = self.c.restore("a", "docs", options=["--dry-run", "--json"]).json
        self.assertEqual((8, 0, None, 800000), (plan["files"], plan["kept_files"], plan["target"], plan["needed_bytes"]))

    def test_the_last_line_says_from_whom_and_when_and_where_to(self):
        to = self.c.path("to")
        result = self.c.restore("a", "docs", to=to)
        self.assertRegex(result.stdout, r"\Adocs: everything is back \([^)]*\) in %s, as of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d, "
                         r"by the catalog of b[ab] on [ab][^\n]*\n\Z" % to)
        told = self.c.restore("a", "docs", to=to, options=["--json"]).json
        self.assertEqual((to, True, 8), (told["target"], told["complete"], told["kept_files"]))
        self.assertRegex(told["catalog_from"], r"\Ab[ab] on [ab]\Z")

    def test_what_is_not_proven_is_counted_and_named(self):
        restore = cbackup.Restore("docs", self.directory(), [], None, False, cbackup.Progress(True))
        restore.plan = cbackup.Plan(self.directory())
        restore.plan.load([[cbackup.CatalogRow(b"x", "f", proven=False), cbackup.CatalogRow(b"y", "f"),
                            cbackup.CatalogRow(b"z", "f", proven=False)]], restore.asked)
        restore.plan.settle([b"x", b"y"])
        self.assertEqual((1, [b"x"]), (restore.unproven_count(), list(restore.unproven())))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), self.assertLogs("cbackup", "INFO") as named:
            cbackup.report_restore(restore, True, False)
        self.assertIn("; 1 of them not proven yet at that time (-v names them)\n", said.getvalue())
        self.assertEqual(["x"], [record.getMessage().split(":")[0] for record in named.records])
        restore.plan.close()


class RoomTest(SaysCase):
    """What cannot end well is not begun."""

    def target(self, size):
        target = self.c.path("target")
        tmpfs_or_skip(self, target, size)
        self.addCleanup(unmount, target)
        return target

    def test_too_little_room_is_said_before_anything_is_written(self):
        target = self.target("600k")
        for options in ([], ["--force"]):
            result = self.c.restore("a", "docs", to=target, options=options)
            self.assertRc(1, result)
            self.assertOneError(result, "has no space", "781 KB are needed", "--to")
            self.assertEqual([], os.listdir(target))
        plan = self.c.restore("a", "docs", to=target, options=["--dry-run"])
        self.assertIn("NO ROOM", plan.stdout)
        self.assertRc(0, self.c.restore("a", "docs", "f1", to=target))
        self.assertEqual(["f1"], os.listdir(target))

    def test_what_is_there_already_counts(self):
        target = self.target("1m")
        for name in ("f0", "f1", "f2", "f3"):
            shutil.copy2(os.path.join(self.source, name), target)
        self.assertRc(0, self.c.restore("a", "docs", to=target))


class FinishedTest(Case):
    """The next status, and the next pass, know that a restore has begun, and that it is over."""

    def test_status_is_right_at_once(self):
        c = self.cluster("s", "a", replicas=1, scan_min="1h")
        source = c.source("docs", "s", FILES)
        c.backup("ba", "a", "10M")
        c.start()
        c.settle()
        work = os.path.join(source, ".cbackup-restore")
        make_tree(work, {"whole": b""})
        self.assertEqual("held", c.status()["sources"]["docs"]["state"])
        self.assertRc(1, c.client("a"))
        os.unlink(os.path.join(source, "f1"))
        self.assertRc(0, c.restore("s", "docs"))
        self.assertEqual("ok", c.status()["sources"]["docs"]["state"])
        self.assertRc(0, c.client("a"))

    def test_what_was_moved_aside_is_not_backed_up(self):
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", FILES)
        c.backup("ba", "a", "10M")
        c.start()
        c.settle()
        write_file(os.path.join(source, "f1"), b"other")
        self.assertRc(0, c.restore("s", "docs", options=["--force"]))
        aside = [name for name in os.listdir(source) if name.startswith(".cbackup-before-")]
        self.assertEqual(b"other", read_file(os.path.join(source, aside[0], "f1")))
        c.settle()
        self.assertFalse(os.path.lexists(os.path.join(c.kept_as("ba", "docs"), aside[0])))


class LineGoneTest(Case):
    """A source without a line is restored and found as long as there are copies."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", FILES)
        c.source("other", "s", {"x": b"1"})
        c.backup("ba", "a", "10M")
        c.start()
        c.settle()
        del c.sources["docs"]
        c.settle()

    def test_restore_and_find(self):
        self.assertOneError(self.c.restore("s", "docs"), "--to DIR")
        to = self.c.path("to")
        self.assertRc(0, self.c.restore("s", "docs", to=to))
        self.assertSameTree(self.source, to)
        self.assertIn("docs/f1    (docs has no line in the configuration any more)", self.c.run("s", "find", "f1").stdout)

    def test_status_says_how_to_get_it_back_before_how_to_lose_it(self):
        text = self.c.run("s", "status").stdout
        self.assertRegex(text, "restore docs --to DIR` brings them back, `cbackup.pyz forget docs` deletes")

    def test_a_name_of_which_nobody_has_anything(self):
        result = self.c.restore("s", "dosc", to=self.c.path("nowhere"))
        self.assertRc(2, result)
        self.assertOneError(result, "dosc", "other")
        self.assertFalse(os.path.exists(self.c.path("nowhere")))


class FindTest(Case):
    """What find prints is what restore takes."""

    def test_each_old_version_comes_back_as_of_the_time_that_is_said(self):
        c = self.cluster("s", "a", "b", replicas=2)
        source = c.source("docs", "s", dict(FILES, note=b"day 0"))
        for host in "ab":
            c.backup("b" + host, host, "10M")
        c.start()
        for day in range(4):
            c.settle()
            c.advance(86400)
            write_file(os.path.join(source, "note"), b"day %d" % (day + 1))
            os.utime(os.path.join(source, "note"), (1000 * day, 1000 * day))
        c.settle()
        versions = c.run("s", "find", "note", "--json").json["files"][0]["versions"]
        self.assertEqual([True] * 2 + [False] * 8, [found["until"] is None for found in versions])
        self.assertEqual([3000.0] * 2 + [2000.0] * 2, [found["mtime"] for found in versions[:4]])
        text = c.run("s", "find", "note").stdout
        whens = [line.partition("; --at ")[2].strip("'") for line in text.splitlines() if "; --at " in line]
        self.assertEqual(8, len(whens), text)
        for number, when in self.todays(enumerate(whens), 4):
            to = c.path("to%d" % number)
            self.assertRc(0, c.restore("s", "docs", "note", to=to, options=["--at", when]))
            self.assertEqual(b"day %d" % (3 - number // 2), read_file(os.path.join(to, "note")))
        self.assertRegex(text, r"    ba on a: a copy, 5 bytes, of 1970-01-01 00:50:00\+00:00\n")


class PartTest(Case):
    """Some paths of a source: only what concerns them is read, and all that is needed is found."""

    def test_a_directory_a_pattern_and_what_is_called_otherwise_now(self):
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", {"x/%d" % number: b"%d" % number for number in range(20)})
        make_tree(source, {"x y/a": b"1", "x/deep/b": b"2", "xx": b"3", "z[1]": b"4"})
        c.backup("ba", "a", "10M")
        c.start()
        c.settle()
        for paths, names in self.todays(((["x"], 21), (["x/"], 21), (["x*/?"], 12), (["x/deep", "xx"], 2), (["z[[]1]"], 1),
                                         (["z[1]"], 1), (["*"], 24), (["x/1*", "x y"], 12), (["*/b", "*x"], 2)), 4):
            with self.subTest(paths=paths):
                to = os.path.join(self.directory(), "to")
                self.assertRc(0, c.restore("s", "docs", *paths, to=to))
                self.assertEqual(names, sum(len(files) for _, _, files in os.walk(to)), paths)
        os.rename(os.path.join(source, "x/deep"), os.path.join(source, "moved"))
        c.advance(86400)
        c.settle()
        to = c.path("then")
        self.assertRc(0, c.restore("s", "docs", "x/deep", to=to, options=["--at", "1d"]))
        self.assertEqual(b"2", read_file(os.path.join(to, "x/deep/b")))


class DeadDiskTest(unittest.TestCase):
    def test_the_advice_is_another_disk_and_a_restore(self):
        advice = cbackup.held_advice("docs", {"cause": "gone", "reason": "/x cannot be read"})
        self.assertIn("put in another", advice)
        self.assertTrue(advice.endswith("restore docs"), advice)
        self.assertNotIn("forget", advice)


class JsonTest(Case):
    """With --json there is one object on standard output, also when it fails."""

    def test_one_object_whatever_happens(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", FILES)
        c.backup("ba", "a", "10M")
        c.write_config()
        none = self.directory()
        for rc, home, words, more in (
                (2, none, ["status"], {}), (2, none, ["plan"], {"fits": None}), (2, none, ["find", "x"], {"files": []}),
                (2, none, ["client"], {"settled": False}), (2, none, ["restore", "docs"], {"complete": False}),
                (1, c.home("a"), ["restore", "docs", "--to", c.path("to")], {"complete": False}),
                (2, c.home("a"), ["restore", "docs", "--at", "x", "--to", c.path("to")], {"complete": False}),
                (2, c.home("a"), ["restore"], {})):
            with self.subTest(words=words):
                result = c.run("a", "--home", home, *(words + ["--json"]))
                self.assertRc(rc, result)
                told = json.loads(result.stdout)
                self.assertEqual(more, {key: told[key] for key in told if key != "error"})
                self.assertIn(told["error"].splitlines()[0], result.stderr)


class TimesTest(Case):
    """Times are printed as --at reads them, and the hour that comes twice can be told apart."""

    def test_in_every_form(self):
        os.environ["TZ"] = "Europe/Berlin"
        self.addCleanup(cbackup.time.tzset)
        self.addCleanup(os.environ.pop, "TZ")
        cbackup.time.tzset()
        summer = 1792888200     # 2026-10-25 02:30 for the first time
        for word, expected in (("2026-10-25 02:30:00+02:00", summer), ("2026-10-25 02:30:00+0100", summer + 3600),
                               ("2026-10-25T00:30:00Z", summer), ("2026-10-25 02:30:00", summer + 3600),
                               ("2026-10-25 02:30+02:00", summer + 59), ("2026-1-5", 1767653999)):
            with self.subTest(word=word):
                self.assertEqual(expected, cbackup.parse_time(word))
        for when in (summer, summer + 3600, summer + 86400, 0):
            self.assertEqual(when, cbackup.parse_time(cbackup.format_time(when)))
        for word in ("2026-10-25 02:30+99:00", "2026-10-25 02:30 CET", "2026-10-25 02"):
            with self.assertRaises(cbackup.UsageError):
                cbackup.parse_time(word)


if __name__ == "__main__":
    unittest.main()
