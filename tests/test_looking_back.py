"""ls shows what a directory had, now or then; log what the passes of a host did."""

import os
import unittest

from tests.harness import Case, Link, write_file


class LsTest(Case):
    """Files in nested directories, a backup on another host, a second one an hour later, and one change another hour later."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b")
        cls.source = c.source("docs", "s", {
            "top.txt": 100, "album/1.jpg": 1000, "album/2.jpg": 2000, "album/deep/er/3.jpg": 10, "album-2/x": 1,
            "album/link": Link("1.jpg"), b"album/caf\xe9 <b>": 5})
        c.backup("ba", "a", "7M")
        c.start()
        c.passes("a")
        c.advance(3600)
        c.backup("bb", "b", "7M")
        for _ in range(2):
            c.passes("ba")      # a hears that b has copies, too
        cls.catalogs = os.listdir(os.path.join(c.backups["ba"].path, ".cbackup", "catalog", "docs"))
        cls.times = c.run("a", "ls", "docs", "--times", "--json").json["times"]
        c.advance(3600)
        write_file(os.path.join(cls.source, "album/2.jpg"), "another")
        os.unlink(os.path.join(cls.source, "album/1.jpg"))
        c.passes("a")
        cls.halfway = c.run("b", "ls", "docs", "album/2.jpg", "--json").json
        c.passes("b")

    def ls(self, *words, rc=0, host="b"):
        result = self.c.run(host, "ls", "docs", *words, "--json")
        self.assertRc(rc, result)
        return result.json

    def entries(self, *words):
        return {entry["name"]: entry for entry in self.ls(*words)["entries"]}

    def test_a_directory_is_shown_with_sizes_copies_and_older_versions(self):
        found = self.entries()
        self.assertEqual({"top.txt": "file", "album": "directory", "album-2": "directory"},
                         {name: entry["kind"] for name, entry in found.items()})
        self.assertEqual((100, 2, 0), tuple(found["top.txt"][key] for key in ("size", "copies", "older")))
        album = self.ls("album")
        found = {entry["name"]: entry for entry in album["entries"]}
        self.assertEqual({"2.jpg", "deep", "link", "caf\udce9 <b>"}, set(found))
        self.assertEqual((7, 2, 1), tuple(found["2.jpg"][key] for key in ("size", "copies", "older")))
        self.assertEqual(("symlink", "1.jpg", None), tuple(found["link"][key] for key in ("kind", "target", "copies")))
        self.assertAlmostEqual(os.stat(self.source + "/album/2.jpg").st_mtime, found["2.jpg"]["mtime"], 3)
        self.assertEqual(["1.jpg"], album["gone"])

    def test_a_backup_that_still_has_an_older_version_has_no_copy(self):
        self.assertEqual([(7, 1)], [(entry["size"], entry["copies"]) for entry in self.halfway["entries"]])

    def test_what_it_had_then(self):
        found = self.entries("album", "--at", "30m")
        self.assertEqual({"1.jpg": (1000, 2), "2.jpg": (2000, 2)},
                         {name: (found[name]["size"], found[name]["copies"]) for name in ("1.jpg", "2.jpg")})
        times = self.ls("--times")["times"]
        self.assertEqual(sorted(times, reverse=True), times)
        self.assertGreater(times[0] - times[-1], 3000)

    def test_times_are_those_of_changes_and_not_of_copies(self):
        self.assertLess(1, len(self.catalogs))
        self.assertEqual(1, len(self.times))
        self.assertEqual(2, len(self.ls("--times", host="a")["times"]))

    def test_a_single_file_and_paths_written_in_other_ways(self):
        for word in self.todays(("album/2.jpg", "/album//2.jpg", "album/deep/../2.jpg"), 1):
            self.assertEqual([("2.jpg", 7, 2, 1)], [(e["name"], e["size"], e["copies"], e["older"])
                                                    for e in self.ls(word)["entries"]])
        self.assertEqual({"er"}, set(self.entries("album/deep/")))

    def test_the_text_is_for_people(self):
        result = self.c.run("b", "ls", "docs", "album")
        self.assertRc(0, result)
        self.assertRegex(result.stdout, r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d +7 bytes  2 copies, 1 older +2\.jpg$")
        self.assertIn("caf\\xe9 <b>", result.stdout)
        self.assertIn("gone, with old versions: 1.jpg", result.stdout)

    def test_what_is_not_there_is_an_error_that_says_so(self):
        result = self.c.run("b", "ls", "docs", "nowhere")
        self.assertRc(1, result)
        self.assertOneError(result, "docs had no nowhere")
        result = self.c.run("b", "ls", "photos")
        self.assertRc(2, result)
        self.assertOneError(result, "there are: docs")

    def test_a_directory_of_thousands_comes_in_pages(self):
        import cbackup
        reader = cbackup.VaultReader(cbackup.Backup(name="ba", host="a", path=self.c.backups["ba"].path))
        found, after, pages = [], b"", 0
        page, cbackup.PAGE = cbackup.PAGE, 2
        try:
            while after is not None:
                rows, after = reader.list_directory("docs", b"album", False, after)
                self.assertLessEqual(len(rows), 2)
                found += [(row[0], row[1]) for row in rows]
                pages += 1
        finally:
            cbackup.PAGE = page
        self.assertEqual([(b"2.jpg", 7), (b"caf\xe9 <b>", 5), (b"deep", None)], found)
        self.assertEqual(2, pages)

    def test_the_log_says_what_was_done_the_newest_first(self):
        passes = self.c.run("a", "log", "--json").json["passes"]
        self.assertEqual(sorted((one["time"] for one in passes), reverse=True), [one["time"] for one in passes])
        self.assertEqual(6, passes[-1]["copied_files"])
        self.assertEqual(1, sum(one["updated_files"] for one in passes))
        text = self.c.run("a", "log")
        self.assertRc(0, text)
        self.assertRegex(text.stdout, r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d  6 copied \(3\.\d+ KB\), in \d+ s$")
        self.assertIn("1 changed", text.stdout)


class LogTest(Case):

    def test_a_host_that_is_down_is_in_the_log(self):
        c = self.cluster("s", "a")
        c.source("docs", "s", {"f": 1})
        c.backup("ba", "a", "7M")
        c.start("a")
        self.assertRc(1, c.client("a"))
        record = c.run("a", "log", "--json").json["passes"][0]
        self.assertEqual(["s"], record["unreachable"])
        self.assertIn("cannot be reached", c.run("a", "log").stdout)

    def test_idle_passes_are_one_line_and_the_log_is_bounded(self):
        import cbackup
        home = cbackup.Home(os.path.join(self.directory(), "home"))
        record = dict(dict.fromkeys(cbackup.PASS_COUNTS, 0), time=0, seconds=1, unreachable=[], wrong=[], settled=True)
        limit, cbackup.PASSES_LIMIT = cbackup.PASSES_LIMIT, 20000
        try:
            for number in range(300):
                home.note_pass(dict(record, time=1000000 + number * 900))
        finally:
            cbackup.PASSES_LIMIT = limit
        path = home.state("passes.jsonl")
        self.assertLess(os.path.getsize(path), 20300)
        kept = list(home.passes())
        self.assertEqual(1000000 + 299 * 900, kept[0]["time"])
        self.assertGreater(len(kept), 30)
        self.assertEqual(1, len(list(cbackup.pass_lines(kept))))
        with open(path, "ab") as stream:                    # what a crash or a bad disk leaves
            stream.write(b'{"time": "x"}\n[1]\n\xff\xfe\n{"time": 1, "sec')
        self.assertEqual(kept, list(home.passes()))
        home.note_pass(dict(record, time=5))
        self.assertEqual(len(kept), len(list(home.passes())))       # the half line took the next with it, and no more
        home.note_pass(dict(record, time=6))
        self.assertEqual(6, next(home.passes())["time"])


if __name__ == "__main__":
    unittest.main()
