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


class WhereToTest(Case):
    """Without --to it goes to the source's own path, but only on the source's own host, or what is
    to be it. What cannot end well is not begun."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.source = cls.c.source("docs", "s", FILES)
        for host in "ab":
            cls.c.backup("b" + host, host, "10M")
        cls.c.start()
        cls.c.passes("ab")

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

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1, scan_min="1h")
        cls.docs = c.source("docs", "s", FILES)
        cls.other = c.source("other", "s", FILES)
        c.backup("ba", "a", "10M")
        c.advance(60)       # by that clock the first look will have been
        c.start()
        c.round()

    def test_status_is_right_at_once(self):
        work = os.path.join(self.docs, ".cbackup-restore")
        make_tree(work, {"whole": b""})
        self.assertEqual("held", self.c.status()["sources"]["docs"]["state"])
        self.assertRc(1, self.c.client("a"))
        os.unlink(os.path.join(self.docs, "f1"))
        self.assertRc(0, self.c.restore("s", "docs"))
        self.assertEqual("ok", self.c.status()["sources"]["docs"]["state"])
        self.assertRc(0, self.c.client("a"))

    def test_what_was_moved_aside_is_not_backed_up(self):
        write_file(os.path.join(self.other, "f1"), b"other")
        self.assertRc(0, self.c.restore("s", "other", options=["--force"]))
        aside = [name for name in os.listdir(self.other) if name.startswith(".cbackup-before-")]
        self.assertEqual(b"other", read_file(os.path.join(self.other, aside[0], "f1")))
        self.c.stop("s")
        self.c.start("s")       # looks at its sources once more
        self.c.round()
        self.assertFalse(os.path.lexists(os.path.join(self.c.kept_as("ba", "other"), aside[0])))


class FoundCase(Case):
    """One cluster for the class: `docs` with a note that changes each day; `gone`, which has no line on the last day; and
    `many`, in which something is called otherwise on that day."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        docs = c.source("docs", "s", {"f": b"f", "note": b"day 0"})
        cls.gone = c.source("gone", "s", {"f1": 1000, "f2": 2000})
        many = c.source("many", "s", {"x/%d" % number: b"%d" % number for number in range(20)})
        make_tree(many, {"x y/a": b"1", "x/deep/b": b"2", "xx": b"3", "z[1]": b"4", "y/deep/c": b"5"})
        for host in "ab":
            c.backup("b" + host, host, "10M")
        c.start()
        c.passes("ab")
        for day in (1, 2):
            c.advance(86400)
            write_file(os.path.join(docs, "note"), b"day %d" % day)
            os.utime(os.path.join(docs, "note"), (1500 * day, 1500 * day))
            if day == 2:
                os.rename(os.path.join(many, "y/deep"), os.path.join(many, "moved"))
                del c.sources["gone"]
            c.passes("ab")


class LineGone(FoundCase):
    """A source without a line is restored and found as long as there are copies."""

    def test_restore_and_find(self):
        self.assertOneError(self.c.restore("s", "gone"), "--to DIR")
        to = self.c.path("to")
        self.assertRc(0, self.c.restore("s", "gone", to=to))
        self.assertSameTree(self.gone, to)
        self.assertIn("gone/f1    (gone has no line in the configuration any more)", self.c.run("s", "find", "f1").stdout)

    def test_status_says_how_to_get_it_back_before_how_to_lose_it(self):
        text = self.c.run("s", "status").stdout
        self.assertRegex(text, "restore gone --to DIR` brings them back, `cbackup.pyz forget gone` deletes")

    def test_a_name_of_which_nobody_has_anything(self):
        result = self.c.restore("s", "dosc", to=self.c.path("nowhere"))
        self.assertRc(2, result)
        self.assertOneError(result, "dosc", "many")
        self.assertFalse(os.path.exists(self.c.path("nowhere")))


class Find(FoundCase):
    """What find prints is what restore takes."""

    def test_each_old_version_comes_back_as_of_the_time_that_is_said(self):
        versions = self.c.run("s", "find", "note", "--json").json["files"][0]["versions"]
        self.assertEqual([True] * 2 + [False] * 4, [found["until"] is None for found in versions])
        self.assertEqual([3000.0] * 2 + [1500.0] * 2, [found["mtime"] for found in versions[:4]])
        text = self.c.run("s", "find", "note").stdout
        whens = [line.partition("; --at ")[2].strip("'") for line in text.splitlines() if "; --at " in line]
        self.assertEqual(4, len(whens), text)
        for number, when in self.todays(enumerate(whens), 2):
            to = os.path.join(self.directory(), "to")
            self.assertRc(0, self.c.restore("s", "docs", "note", to=to, options=["--at", when]))
            self.assertEqual(b"day %d" % (1 - number // 2), read_file(os.path.join(to, "note")))
        self.assertRegex(text, r"    ba on a: a copy, 5 bytes, of 1970-01-01 00:50:00\+00:00\n")


class Part(FoundCase):
    """Some paths of a source: only what concerns them is read, and all that is needed is found."""

    def test_a_directory_a_pattern_and_what_is_called_otherwise_now(self):
        for paths, names in self.todays(((["x"], 21), (["x/"], 21), (["x*/?"], 12), (["x/deep", "xx"], 2), (["z[[]1]"], 1),
                                         (["z[1]"], 1), (["*"], 25), (["x/1*", "x y"], 12), (["*/b", "*x"], 2)), 2):
            with self.subTest(paths=paths):
                to = os.path.join(self.directory(), "to")
                self.assertRc(0, self.c.restore("s", "many", *paths, to=to))
                self.assertEqual(names, sum(len(files) for _, _, files in os.walk(to)), paths)
        to = self.c.path("then")
        self.assertRc(0, self.c.restore("s", "many", "y/deep", to=to, options=["--at", "1d"]))
        self.assertEqual(b"5", read_file(os.path.join(to, "y/deep/c")))


class FindTest(Find, LineGone, Part):
    """All of these with one cluster."""


del Find, LineGone, Part        # not to be run each for itself


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
