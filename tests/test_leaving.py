"""Machines, backups and sources that come, change and go: what a changed line does, and what it never does."""

import os
import shutil
import sys
import tempfile
import unittest

from tests.harness import TOP, Case, free_port, inodes, make_tree, read_file, tree, wait_for, write_file

sys.path.insert(0, TOP)
import cbackup  # noqa: E402
from tests.members import Member  # noqa: E402

FILES = {"f%d" % number: 20000 + number for number in range(12)}


class LeavingCase(Case):
    """Two copies wanted of a source on s, which has a backup of its own too; backups on a, b and c."""

    HOSTS, KEYS = "sabc", {"replicas": 2}

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster(*cls.HOSTS, **cls.KEYS)
        cls.source = c.source("docs", "s", FILES)
        for host in cls.HOSTS:
            if host != "s":
                c.backup("b" + host, host, "1M")
        c.start()

    def say(self, *arguments, host="s"):
        """What `status` says to people."""
        return self.c.run(host, "status", *arguments).stdout

    def change(self, backup, **options):
        """Changes a backup's line on host a, the others hear of it in the next passes."""
        self.c.backups[backup] = self.c.backups[backup]._replace(
            options={key: value for key, value in dict(self.c.backups[backup].options, **options).items()
                     if value is not None})

    def leave(self, backup):
        """Writes `leaving` behind a backup's line on host a."""
        c = self.c
        text = c.config()
        line = next(line for line in text.split("\n") if line.startswith(backup + " = "))
        c._written = text
        write_file(os.path.join(c.home("a"), "cbackup.conf"), text.replace(line, line + " leaving"))

    def together(self, *hosts):
        """A pass of each of these hosts at the same time. In this process: there are many, and most of such a pass is
        the start of Python; servers and rsync are processes of their own."""
        self.c.write_config()
        figures = {host: None for host in hosts}

        def run(host):
            home = cbackup.Home(self.c.home(host), host)
            figures[host] = cbackup.Client(home, home.config(), host, cbackup.Progress(True)).run()
        cbackup.in_parallel(run, hosts)
        self.assertEqual([], [line for one in figures.values() for line in one.lines
                              if not line.startswith("the configuration has changed elsewhere")])     # said once
        return [one.as_json() for one in figures.values()]

    def lying(self, *backups):
        """{backup: the files that lie in it as copies of the source, and whether they were touched}"""
        places = {name: self.c.kept_as(name, "docs") for name in backups}
        return {name: inodes(path) if os.path.isdir(path) else {} for name, path in places.items()}

    def copies(self):
        """{number of distinct hosts with a confirmed copy: files}, as the server counts them."""
        self.c.write_config()
        with Member(self.c, next(iter(self.c.backups)), "docs") as member:
            found = member.ask("status")["sources"]["docs"]["copies"]
        return {int(count): files for count, files in found.items() if files}

    def settle(self, *hosts):
        """Passes of these hosts until nobody had anything to do; first one after the other, so that the first can tell
        the others of an edit."""
        figures = [self.together(host)[0] for host in hosts]
        for _ in range(8):
            if all(one["settled"] for one in figures):
                return
            figures = self.together(*hosts)
        self.fail("not settled: %s" % figures)


class BackupsComeAndGoTest(LeavingCase):

    def spread(self, *backups):
        """Two copies of each file in these backups, and no other, whatever was run before."""
        self.c.backups = {name: backup for name, backup in self.c.backups.items() if name in backups}
        if self.copies() != {2: 12}:
            self.settle(*(self.c.backups[name].host for name in backups))
            self.assertEqual({2: 12}, self.copies())

    def test_01_a_new_backup_takes_its_share_and_nothing_else_is_edited(self):
        c = self.c
        c.backups.pop("bc")
        os.rmdir(c.path("c", "backup", "bc"))
        self.settle("a", "b")
        self.assertEqual({2: 12}, self.copies())
        make_tree(self.source, {"more%d" % number: 150000 for number in range(8)})      # too much for two of 1 MB
        self.together("a", "b")
        self.assertLess(self.copies().get(2, 0), 20)
        c.backup("bc", "c", "2M")
        c.write_config("c")
        self.settle("c", "a", "b")
        self.assertEqual({2: 20}, self.copies())
        self.assertCopies(c, "docs", 2)
        self.assertWithinSize(c)
        for name in list(tree(self.source)):
            if name.startswith("more"):
                os.unlink(os.path.join(self.source, name))
        self.settle("c", "a", "b")

    def test_02_one_that_is_leaving_counts_until_its_copies_are_elsewhere_and_is_then_said_to_be_free(self):
        c = self.c
        self.spread("ba", "bb", "bc")
        held = {name for name, backups in c.copies_on_disk("docs").items() if "ba" in backups}
        self.assertTrue(held)
        before = c.kept_inodes("ba")
        self.leave("ba")
        self.assertRc(0, c.client("a"))
        # Nobody else has made a copy yet: they all count, and are all needed.
        self.assertEqual({2: 12}, self.copies())
        self.assertRc(0, c.run("s", "status", "--check"))
        self.assertRegex(self.say(), r"(?m)^ba .*\n    leaving: %d cop(y|ies) still needed here" % len(held))
        self.assertEqual(before, c.kept_inodes("ba"))
        c.kill("b")
        self.assertNotIn("unplugged", self.say())
        c.start("b")
        self.settle("b", "c", "a")
        self.assertRegex(self.say(), r"(?m)^ba .*\n    leaving: it can be unplugged now")
        for name, backups in c.copies_on_disk("docs").items():
            self.assertEqual({"bb", "bc"}, set(backups) - {"ba"}, name)
        # And that is true: unplugged, nothing is missing.
        os.rename(c.backups["ba"].path, c.path("unplugged"))
        c.backups.pop("ba")
        c.write_config("b")
        self.settle("b", "c")
        self.assertEqual({2: 12}, self.copies())
        self.assertRc(0, c.run("s", "status", "--check"))

    def test_03_a_removed_one_no_longer_counts_and_its_data_is_left_alone(self):
        c = self.c
        self.spread("bb", "bc")
        before = inodes(c.backups["bc"].path)
        removed = c.backups.pop("bc")
        c.write_config("c")
        self.assertRc(0, c.client("c"))
        self.assertEqual({1: 12}, self.copies())
        self.assertRc(1, c.run("s", "status", "--check"))
        self.assertRc(0, c.client("b"))
        self.assertEqual(before, inodes(removed.path))
        # Its line is back: its copies count again from its first word on, and none of them is made again.
        c.backups["bc"] = removed
        c.write_config("b")
        self.assertRc(0, c.client("b"))
        self.assertEqual({1: 12}, self.copies())
        result = c.client("c")
        self.assertRc(0, result)
        self.assertEqual(0, result.json["copied_files"])
        self.assertEqual({2: 12}, self.copies())
        self.assertCopies(c, "docs", 2)


class SourcesAndLinesTest(LeavingCase):

    HOSTS = "sab"

    def copied(self):
        """All is copied, whatever was run before."""
        if set(self.copies()) != {2}:
            self.settle("a", "b")

    def remove(self):
        """Removes the source's line on b; returns what is to be put back.  It is the only source: the others hold such a
        configuration back until somebody says that it is right."""
        removed = self.c.sources.pop("docs")
        self.c.write_config("b")
        self.c.run("b", "accept", "config")
        self.together("b")                    # which tells s: a pass of a that began with the old one would complain
        self.together("a")
        return removed

    def put_back(self, removed):
        self.c.sources["docs"] = removed
        self.c.write_config("b")

    def test_01_the_copies_of_a_removed_source_stay_and_are_listed(self):
        c = self.c
        c.round()
        before = self.lying("ba", "bb")
        removed = self.remove()
        self.together("a", "b")
        self.assertEqual(before, self.lying("ba", "bb"))
        said = self.say(host="a")
        for name in before:
            self.assertRegex(said, r"(?m)^%s .*\n    has 12 files of docs, which is no longer configured" % name)
            self.assertIn("forget docs", said)
        self.put_back(removed)
        self.assertEqual(0, sum(one["copied_files"] for _ in range(2) for one in self.together("b", "a")))
        self.assertEqual({2: 12}, self.copies())

    def test_02_forget_asks_first_and_then_deletes_only_here(self):
        c = self.c
        self.copied()
        before = self.lying("ba", "bb")
        result = c.run("a", "forget", "docs", "--yes")
        self.assertRc(2, result)
        self.assertOneError(result, "docs", "remove its line")
        removed = self.remove()
        result = c.run("a", "forget", "docs")
        self.assertRc(2, result)
        self.assertOneError(result, "docs", "--yes")
        self.assertEqual(before, self.lying("ba", "bb"))
        self.assertRc(0, c.run("a", "forget", "docs", "--yes"))
        self.assertEqual(dict(before, ba={}), self.lying("ba", "bb"))
        self.assertFalse(os.path.lexists(c.kept_as("ba", "docs")))
        self.put_back(removed)
        self.together("b")
        # The line is back: what was forgotten does not count, though the books had it.
        self.assertLessEqual(sum(count * files for count, files in self.copies().items()), 12)
        self.settle("a", "b")
        self.assertEqual({2: 12}, self.copies())
        self.assertCopies(c, "docs", 2)

    def test_03_everywhere_tells_the_other_hosts_and_what_was_said_does_not_outlive_its_being_done(self):
        self.copied()
        removed = self.remove()
        self.assertRc(0, self.c.run("a", "forget", "docs", "--yes", "--everywhere"))
        self.together("b")
        self.assertEqual({"ba": {}, "bb": {}}, self.lying("ba", "bb"))
        self.assertNotIn("no longer configured", self.say())
        # Another source of that name is another source: when its line goes too, nobody has said `forget` of it.
        self.put_back(removed)
        self.settle("b", "a")
        before = self.lying("ba", "bb")
        self.assertEqual([12, 12], [len(files) for files in before.values()])
        removed = self.remove()
        self.together("a", "b")
        self.assertEqual(before, self.lying("ba", "bb"))
        self.put_back(removed)

    def test_04_nor_its_being_configured_again_before_it_was_done(self):
        self.settle("b", "a")
        before = self.lying("ba")
        removed = self.remove()
        self.assertRc(0, self.c.run("b", "forget", "docs", "--yes", "--everywhere"))
        self.put_back(removed)                                       # before a pass ran on a
        self.together("b")                                           # which tells a's server
        self.remove()
        self.together("a")
        self.assertEqual(before, self.lying("ba"))
        self.put_back(removed)

    # -- changed lines --

    def test_05_more_and_fewer_copies(self):
        c = self.c
        self.settle("a", "b")
        self.assertEqual({2: 12}, self.copies())
        c.keys["replicas"] = 1
        c.write_config("b")
        self.settle("b", "a")
        self.assertEqual({2: 12}, self.copies())      # there is room: nothing is deleted for nothing
        self.change("ba", size="100K")
        c.write_config("b")
        self.settle("b", "a")
        self.assertWithinSize(c)
        self.assertNotIn(0, self.copies())
        self.assertIn(1, self.copies())
        self.change("ba", size="1M")
        c.keys["replicas"] = 2
        c.write_config("a")
        self.settle("a", "b")
        self.assertEqual({2: 12}, self.copies())
        self.assertCopies(c, "docs", 2)

    def test_06_a_reserve_that_cannot_be_kept_takes_nothing_more(self):
        c = self.c
        free = os.statvfs(c.base)
        self.change("bb", reserve=free.f_bavail * free.f_frsize * 2)
        c.write_config("a")
        make_tree(self.source, {"late": 1000})
        c.passes("ab")
        self.assertEqual(["ba"], c.copies_on_disk("docs")["late"])
        self.change("bb", reserve=None)
        c.write_config("a")
        self.settle("a", "b")
        self.assertCopies(c, "docs", 2)

    def test_07_a_directory_elsewhere_is_recognised_and_nothing_is_copied_again(self):
        c = self.c
        self.copied()
        for old, new in ((self.source, c.path("s", "moved source")),
                         (c.backups["ba"].path, c.path("a", "moved backup"))):
            os.rename(old, new)
        before = c.backups["ba"].path
        type(self).source = c.path("s", "moved source")
        c.sources["docs"] = c.sources["docs"]._replace(path=self.source)
        c.backups["ba"] = c.backups["ba"]._replace(path=c.path("a", "moved backup"))
        kept = c.kept_inodes("ba")
        c.write_config("a")
        figures = self.together("a") + self.together("b") + self.together("a", "b")
        for one in figures:
            self.assertEqual((0, 0, 0, 0), tuple(one[key] for key in (
                "copied_files", "updated_files", "dropped_files", "wire_bytes")), one)
        self.assertEqual(kept, c.kept_inodes("ba"))
        self.assertFalse(os.path.exists(before))
        self.assertCopies(c, "docs", 2)
        wait_for(lambda: c.run("s", "status", "--check").rc == 0, 20, "a's server looks where the backup was")

    def test_08_a_source_on_another_disk_with_the_same_files_is_the_same_source(self):
        c, here = self.c, os.stat(self.source).st_dev
        self.copied()
        others = [path for path in ("/dev/shm", "/var/tmp") if os.path.isdir(path) and os.stat(path).st_dev != here]
        if not others:
            self.skipTest("no second file system here")
        other = tempfile.mkdtemp(prefix="cbackup-test-", dir=others[0])
        self.addCleanup(shutil.rmtree, other)
        shutil.copytree(self.source, os.path.join(other, "docs"), symlinks=True)       # keeps the times
        old = c.sources["docs"]
        c.sources["docs"] = old._replace(path=os.path.join(other, "docs"))
        c.write_config("b")
        figures = self.together("b") + self.together("a", "b")
        self.assertEqual([(0, 0)] * 3, [(one["copied_files"], one["dropped_files"]) for one in figures])
        self.assertLess(sum(one["wire_bytes"] for one in figures), sum(FILES.values()))
        self.assertEqual("ok", c.status()["sources"]["docs"]["state"])
        self.assertCopies(c, "docs", 2)
        c.sources["docs"] = old
        c.write_config("b")
        self.together("b")
        self.together("b", "a")
        self.assertEqual({2: len(tree(self.source))}, self.copies())

    def test_09_a_hosts_new_address_is_one_line(self):
        c = self.c
        port, holder = free_port()
        c._holders.append(holder)
        c.stop("s")
        c.ports["s"] = port
        c.write_config("a")
        text = read_file(os.path.join(c.home("a"), "cbackup.conf"))
        self.assertEqual(["s"], c.client("b").json["unreachable"])
        write_file(os.path.join(c.home("s"), "cbackup.conf"), text)     # as s was started with another one
        c.start("s")
        make_tree(self.source, {"after the move": 77})
        self.settle("a", "b")
        self.assertEqual(text, read_file(os.path.join(c.home("b"), "cbackup.conf")))
        self.assertCopies(c, "docs", 2)

    # -- what is accepted though it is not wise, and what cannot be, is said --

    def test_10_two_backups_on_one_disk_and_too_few_hosts_are_said(self):
        c = self.c
        said = self.say()
        self.assertNotIn("one disk", said)
        self.assertNotIn("IMPOSSIBLE", said)
        c.backup("ba2", "a", "1M")
        c.backup("bs", "s", "1M")                 # a host that has all the replicas of its own source has none
        c.keys["replicas"] = 3
        c.write_config("a")
        self.together("a", "b")
        self.together("s")
        self.assertEqual([], [name for name, backups in c.copies_on_disk("docs").items() if "bs" in backups])
        wait_for(lambda: "ba and ba2 are on one disk" in c.servers["a"].stderr, 20, "the server does not say it")
        wait_for(lambda: "ba and ba2 are on one disk of a" in self.say(), 20, "nor does status")
        self.assertRegex(self.say(), r"(?m)^docs .*\n    IMPOSSIBLE: 3 copies .* only 2 other hosts")
        check = c.run("s", "status", "--check")
        self.assertRc(1, check)
        self.assertEqual(1, len(check.stdout.splitlines()))
        self.assertIn("only 2 other hosts", check.stdout)
        self.assertIn("3 copies", c.servers["s"].stderr)
        self.assertRc(1, c.run("s", "plan"))
        self.assertNotIn(3, self.copies())


if __name__ == "__main__":
    unittest.main()
