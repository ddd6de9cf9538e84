"""Restore: what a machine that has lost everything gets back, from whichever hosts are up."""

import os
import shutil
import stat
import unittest

from tests.harness import DIRECTORY, Case, Link, digest_of, inodes, make_tree, read_file, some_bytes, tree, write_file


LEFT_FOR_THE_NEXT = ".cbackup-restore"      # in the target, until a restore is complete


def family_photos():
    """A source with some of everything."""
    files = {"20%02d/%02d/img %d.jpg" % (number % 7, number % 12, number): 300 + 37 * number for number in range(24)}
    files.update({"empty": b"", "void": DIRECTORY, "a/b/c/void": DIRECTORY, "latest": Link("2001/01"),
                  "gone": Link("x/y"), "etc": Link("/etc"), b"odd \xff\n name*": b"odd", "-rf": b"dash",
                  "large": 3 << 20, "same 1": b"twice the same", "same 2": b"twice the same", "tool": b"#!/bin/sh\n"})
    return files


class RestoreCase(Case):
    """One cluster for the class: a source on s that is down, 2 copies on three hosts that are up between tests."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", "c")
        cls.source = cls.c.source("photos", "s")
        for host in "abc":
            cls.c.backup("b" + host, host, "10M")
        cls.c.start()
        # A third of the files each on a and b, b and c, c and a.
        files = list(family_photos().items())
        for number, pair in enumerate(("ab", "bc", "ca")):
            make_tree(cls.source, dict(files[number::3]))
            cls.c.passes(pair)
        os.chmod(os.path.join(cls.source, "tool"), 0o751)
        os.chmod(os.path.join(cls.source, "2001"), 0o500)
        os.utime(os.path.join(cls.source, "2001/01"), ns=(1, 1234567890123456789))
        os.utime(os.path.join(cls.source, "gone"), ns=(1, 1234567890987654321), follow_symlinks=False)
        cls.c.settle()
        cls.c.kill("s")
        cls.holders = cls.c.copies_on_disk("photos")
        cls.tree = tree(cls.source)
        cls.machines = 0

    def machine(self):
        """A machine with nothing but cbackup.conf and cluster.pem; returns its name."""
        type(self).machines += 1
        name = "fresh%d" % self.machines
        self.c.fresh_home(name)
        return name

    def kill_for_this_test(self, *hosts):
        self.c.kill(*hosts)
        self.addCleanup(self.c.start, *hosts)

    def restored(self, *paths, rc=0, to=None, **more):
        """Restores the source on a fresh machine; returns (where, Result)."""
        machine = self.machine()
        to = to or self.c.path(machine, "restored")
        result = self.c.restore(machine, "photos", *paths, to=to, **more)
        self.assertRc(rc, result)
        return to, result

    @staticmethod
    def what_is_back(to):
        """tree(to) without what an incomplete restore keeps there for the next run to go on with."""
        return {name: entry for name, entry in tree(to).items() if name.split(os.sep)[0] != LEFT_FOR_THE_NEXT}

    def copies_of(self, name):
        return [self.c.kept_as(backup, "photos", name) for backup in self.holders[name]]


class OntoAFreshMachine(RestoreCase):
    """With the source's host and any one backup host gone, everything is back as it was."""

    def test_with_all_backups_up(self):
        to, result = self.restored()
        self.assertSameTree(self.tree, to)
        self.assertEqual("", result.stderr)

    def test_with_backup_a_gone(self):
        self.kill_for_this_test("a")
        self.assertSameTree(self.tree, self.restored()[0])

    def test_with_backup_b_gone(self):
        self.kill_for_this_test("b")
        self.assertSameTree(self.tree, self.restored()[0])

    def test_with_backup_c_gone(self):
        self.kill_for_this_test("c")
        self.assertSameTree(self.tree, self.restored()[0])

    def test_the_files_are_spread_so_that_each_of_these_was_a_test(self):
        for backup in ("ba", "bb", "bc"):
            self.assertTrue(any(backup in holders for holders in self.holders.values()), backup)
        self.assertGreater(len({tuple(holders) for holders in self.holders.values()}), 1)

    def test_a_restore_changes_nothing_in_the_backups(self):
        before = [self.c.kept_inodes(backup) for backup in ("ba", "bb", "bc")]
        self.restored()
        self.assertEqual(before, [self.c.kept_inodes(backup) for backup in ("ba", "bb", "bc")])

    def test_a_restore_needs_no_free_name_in_the_cluster(self):
        # The machine's name is not in the configuration, and it has no `host` file: see fresh_home().
        machine = self.machine()
        self.assertEqual({"cbackup.conf", "cluster.pem"}, set(os.listdir(self.c.home(machine))))
        self.assertRc(0, self.c.restore(machine, "photos", "tool", to=self.c.path(machine, "to")))


class Missing(RestoreCase):
    """What cannot be had is listed, each file with its reason; the rest is restored, and a second run gets the rest."""

    partial = None

    @classmethod
    def without_a_and_b(cls):
        """(machine, where, Result, what_is_back(where)) of a restore without these hosts, made once for the class."""
        if cls.partial is None:
            cls.c.kill("a", "b")
            try:
                cls.machines += 1
                machine = "partial%d" % cls.machines
                cls.c.fresh_home(machine)
                to = cls.c.path(machine, "restored")
                result = cls.c.restore(machine, "photos", to=to)
            finally:
                cls.c.start("a", "b")
            cls.partial = machine, to, result, cls.what_is_back(to)
        return cls.partial

    def test_what_is_missing_is_named_and_a_second_run_gets_it(self):
        lost = {name for name, holders in self.holders.items() if holders == ["ba", "bb"]}
        self.assertTrue(lost, "not a test: nothing is only on a and b")
        machine, to, first, back = self.without_a_and_b()
        self.assertRc(1, first)
        for name in lost:
            # Names that no terminal can show are shown in some other way.
            shown = name if name.isprintable() else "odd "
            lines = [line for line in first.text.splitlines() if " %s" % shown in line]
            self.assertEqual(1, len(lines), "%r is not listed, or more than once: %s" % (name, first))
            self.assertTrue("ba" in lines[0] or "bb" in lines[0] or " a" in lines[0], lines[0])
        self.assertSameTree({name: entry for name, entry in self.tree.items() if name not in lost},
                            back, ["dir.mtime_ns"])
        before = inodes(to)
        second = self.c.restore(machine, "photos", to=to)
        self.assertRc(0, second)
        self.assertSameTree(self.tree, to)
        after = inodes(to)
        self.assertEqual([], [name for name in before if name in self.holders and before[name] != after[name]],
                         "files that were there already are not fetched again")

    def test_files_that_are_not_there_at_all_are_not_left_half_done(self):
        _, _, result, back = self.without_a_and_b()
        self.assertRc(1, result)
        self.assertEqual([], [name for name in back if name not in self.tree])

    def test_with_no_backup_up_nothing_is_restored_and_the_hosts_are_named(self):
        self.c.kill("a", "b", "c")
        try:
            to, result = self.restored(rc=1)
        finally:
            self.c.start("a", "b", "c")
        for host in "abc":
            self.assertRegex(result.stderr, r"\b%s\b" % host)
        self.assertFalse(os.path.isdir(to) and self.what_is_back(to))

    def test_a_restore_that_is_killed_is_continued_by_the_next(self):
        machine = self.machine()
        to = self.c.path(machine, "restored")
        process = self.c.spawn(machine, "restore", "photos", "--to", to)
        while not process.ends_within(0.002) and sum(len(names) for _, _, names in os.walk(to)) < 20:
            pass
        process.kill()
        self.assertRc(0, self.c.restore(machine, "photos", to=to))
        self.assertSameTree(self.tree, to)


class Paths(RestoreCase):
    """Some paths of a source: just these, where they belong, with their directories."""

    def assertRestored(self, names, *paths):
        to, _ = self.restored(*paths)
        wanted = {name: entry for name, entry in self.tree.items() if names(name)}
        self.assertSameTree(wanted, to, ["dir.mtime_ns", "dir.mode"])

    def test_a_file(self):
        self.assertRestored(lambda name: name in ("2001", "2001/01", "2001/01/img 1.jpg"), "2001/01/img 1.jpg")

    def test_a_directory(self):
        self.assertRestored(lambda name: (name + "/").startswith("2001/"), "2001")
        self.assertRestored(lambda name: (name + "/").startswith("2001/"), "2001/")

    def test_several(self):
        self.assertRestored(lambda name: (name + "/").startswith("2002/") or name in ("tool", "gone"),
                            "tool", "2002", "gone")

    def test_as_the_manual_has_it_with_to_behind(self):
        machine = self.machine()
        to = self.c.path(machine, "to")
        self.assertRc(0, self.c.run(machine, "restore", "photos", "tool", "empty", "--to", to))
        self.assertEqual({"tool", "empty"}, set(tree(to)))

    def test_a_path_that_is_not_in_the_source_is_named_and_the_others_are_restored(self):
        to, result = self.restored("tool", "no such thing", rc=1)
        self.assertIn("no such thing", result.stderr)
        self.assertEqual({"tool"}, set(self.what_is_back(to)))

    def test_a_path_that_leads_out_is_refused(self):
        for path in ("../photos", "2001/../../..", "/etc/passwd"):
            machine = self.machine()
            result = self.c.restore(machine, "photos", path, to=self.c.path(machine, "to"))
            self.assertRc(1, result)
            self.assertOneError(result, "nothing in photos matches " + path.strip("/"))

    def test_without_to_it_goes_to_the_sources_own_path(self):
        shutil.move(self.source, self.source + ".lost")
        try:
            shutil.rmtree(os.path.join(self.c.home("s"), "state"), ignore_errors=True)
            self.assertRc(0, self.c.restore("s", "photos"))
            self.assertSameTree(self.tree, self.source)
        finally:
            if os.path.isdir(self.source):
                for folder in ("2001", "."):
                    os.chmod(os.path.join(self.source, folder), 0o700)
                shutil.rmtree(self.source)
            shutil.move(self.source + ".lost", self.source)


class BadCopies(RestoreCase):
    """Every byte is checked: a bad copy is never restored, and another holder's is taken instead."""

    def corrupt(self, path, truncate=False):
        """Changes bytes of a copy, but not its size and time; puts it right at the end of the test."""
        content, info = read_file(path), os.stat(path)

        def put(new):
            with open(path, "r+b") as file:
                file.truncate(len(new))
                file.write(new)
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        self.addCleanup(put, content)
        put(content[:len(content) // 2] if truncate else bytes([content[0] ^ 1]) + content[1:])

    def test_corrupted_copies_in_one_backup_are_replaced_by_those_of_another(self):
        for backup in ("ba", "bb", "bc"):
            for name, holders in self.holders.items():
                if backup in holders and os.path.getsize(os.path.join(self.source, name)):
                    self.corrupt(self.c.kept_as(backup, "photos", name))
            self.assertSameTree(self.tree, self.restored()[0])
            self.doCleanups()

    def test_truncated_and_missing_copies_are_replaced_too(self):
        names = [name for name in self.holders if name.startswith("2003/")]
        for number, name in enumerate(names):
            path = self.copies_of(name)[number % 2]
            if number % 3:
                self.corrupt(path, truncate=True)
            else:
                os.rename(path, path + ".away")
                self.addCleanup(os.rename, path + ".away", path)
        self.assertSameTree(self.tree, self.restored()[0])

    def test_a_file_of_which_every_copy_is_bad_is_named_and_not_restored(self):
        name = "2004/04/img 4.jpg"
        for path in self.copies_of(name):
            self.corrupt(path)
        to, result = self.restored(rc=1)
        self.assertIn(name, result.text)
        self.assertSameTree({other: entry for other, entry in self.tree.items() if other != name},
                            self.what_is_back(to), ["dir.mtime_ns"])

    def test_a_copy_that_became_a_symlink_is_not_followed(self):
        name = "2005/05/img 5.jpg"
        secret = os.path.join(self.directory(), "secret")
        for path in self.copies_of(name):
            write_file(secret, read_file(path))
            os.rename(path, path + ".away")
            os.symlink(secret, path)
            self.addCleanup(os.rename, path + ".away", path)
        to, result = self.restored(rc=1)
        self.assertIn(name, result.text)
        self.assertFalse(os.path.lexists(os.path.join(to, name)))


class WhatIsInTheWay(RestoreCase):
    """Nothing is written outside the target or over what differs, unless that was asked for."""

    def target(self, files):
        to = os.path.join(self.directory(), "target")
        make_tree(to, files)
        return to

    def test_nothing_is_written_through_symlinks_in_the_target(self):
        outside = os.path.join(self.directory(), "outside")
        os.mkdir(outside)
        write_file(os.path.join(outside, "victim"), "precious")
        before = inodes(outside), tree(outside), os.stat(outside).st_mtime_ns, os.stat(outside).st_mode
        for options in ([], ["--force"]):
            to = self.target({"2001": Link(outside), "a/b": Link(outside), "tool": Link(outside + "/victim"),
                              "empty": Link(outside + "/new"), "void": Link(outside)})
            result = self.c.restore(self.machine(), "photos", to=to, options=options)
            self.assertRc(1 - len(options), result)
            self.assertEqual(before, (inodes(outside), tree(outside), os.stat(outside).st_mtime_ns,
                                      os.stat(outside).st_mode), "with %s" % options)

    def test_a_target_that_is_a_symlink_itself_is_what_the_user_said(self):
        real = os.path.join(self.directory(), "real")
        os.mkdir(real)
        os.symlink(real, real + ".link")
        self.restored(to=real + ".link")
        self.assertSameTree(self.tree, real)

    def test_identical_files_are_kept_as_they_are(self):
        to, _ = self.restored()
        before = inodes(to)
        self.restored(to=to)
        self.assertEqual(before, inodes(to))

    def test_identical_bytes_get_their_modes_and_times_without_being_fetched(self):
        to = self.target({"large": some_bytes(3 << 20, "large"), "tool": b"#!/bin/sh\n"})
        before = os.stat(os.path.join(to, "large")).st_ino
        self.restored(to=to)
        self.assertEqual(before, os.stat(os.path.join(to, "large")).st_ino)
        self.assertSameTree(self.tree, to)

    def test_differing_files_are_refused_by_name_and_the_rest_is_restored(self):
        mine = {"tool": b"my own work", "2002/02/img 2.jpg": b"my own picture", "gone": b"no link any more"}
        to = self.target(dict(mine, **{"my own file": b"mine"}))
        _, result = self.restored(to=to, rc=1)
        for name, content in mine.items():
            self.assertEqual(content, read_file(os.path.join(to, name)))
            self.assertIn(name, result.stderr)
        self.assertIn("--force", result.stderr)
        self.assertEqual(b"mine", read_file(os.path.join(to, "my own file")))
        for name, entry in self.tree.items():
            if name not in mine and entry.kind == "file":
                self.assertEqual(entry.digest, digest_of(os.path.join(to, name)), name)

    def test_with_force_they_are_replaced_and_kept_aside(self):
        mine = {"tool": b"my own work", "2002/02/img 2.jpg": b"my own picture"}
        to = self.target(dict(mine, **{"my own file": b"mine"}))
        self.restored(to=to, options=["--force"])
        now = tree(to)
        for name, entry in self.tree.items():
            if entry.kind != "dir":
                self.assertEqual(entry, now[name], name)
        contents = [read_file(os.path.join(folder, name)) for folder, _, names in os.walk(os.path.dirname(to))
                    for name in names if not os.path.islink(os.path.join(folder, name))]
        for content in list(mine.values()) + [b"mine"]:
            self.assertEqual(1, contents.count(content), content)

    def test_a_directory_where_a_file_belongs_and_the_reverse_are_named(self):
        to = self.target({"tool/mine": b"1", "2002": b"2"})
        _, result = self.restored(to=to, rc=1)
        self.assertEqual((b"1", b"2"), (read_file(to + "/tool/mine"), read_file(to + "/2002")))
        for name in ("tool", "2002"):
            self.assertIn(name, result.stderr)
        self.assertEqual(self.tree["large"].digest, digest_of(to + "/large"))


class RestoreTest(OntoAFreshMachine, Missing, Paths, BadCopies, WhatIsInTheWay):
    """All of these with one cluster: it takes longer to make than most of them."""


del OntoAFreshMachine, Missing, Paths, BadCopies, WhatIsInTheWay        # not to be run each for itself


class AfterChangesTest(Case):
    """What is restored is the source as the last passes knew it."""

    def test_changed_and_deleted_files_are_restored_as_they_were_last(self):
        cluster = self.cluster("s", "a", "b", "c")
        source = cluster.source("docs", "s", {"f%d" % number: 100 for number in range(30)})
        for host in "abc":
            cluster.backup("b" + host, host, "1M")
        cluster.start()
        cluster.settle()
        write_file(os.path.join(source, "f1"), "changed")
        os.chmod(os.path.join(source, "f2"), 0o600)
        os.unlink(os.path.join(source, "f3"))
        make_tree(source, {"new/f": b"new", "newer": DIRECTORY, "link": Link("f1")})
        cluster.settle()
        expected = tree(source)
        cluster.kill("s", "b")
        cluster.fresh_home("fresh")
        self.assertRc(0, cluster.restore("fresh", "docs", to=cluster.path("to")))
        self.assertSameTree(expected, cluster.path("to"))

    def test_a_file_that_never_got_a_copy_is_missing_and_named(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"small": 100, "too large": 5000})
        cluster.backup("b1", "a", "1K")
        cluster.start()
        cluster.client("a")
        cluster.client("a")
        cluster.kill("s")
        cluster.fresh_home("fresh")
        result = cluster.restore("fresh", "docs", to=cluster.path("to"))
        self.assertRc(1, result)
        self.assertIn("too large", result.text)
        self.assertEqual({"small"}, set(os.listdir(cluster.path("to"))) - {LEFT_FOR_THE_NEXT})

    def test_with_the_sources_host_up_a_restore_works_as_well(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f": b"1", "g": b"2"})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        before = tree(source)
        os.unlink(os.path.join(source, "f"))
        self.assertRc(0, cluster.restore("s", "docs", "f"))
        self.assertEqual(before["f"], tree(source)["f"])


class PrivateTest(Case):
    """What is private stays private while it is restored and afterwards."""

    def test_a_private_file_has_never_been_open_to_others(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("keys", "s", {"id_rsa": b"secret", "dir/id": b"secret"})
        for name in ("id_rsa", "dir/id"):
            os.chmod(os.path.join(source, name), 0o600)
        os.chmod(os.path.join(source, "dir"), 0o700)
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        to = cluster.path("to")
        self.assertRc(0, cluster.restore("a", "keys", to=to))
        for root in (to, cluster.kept_as("b1", "keys")):
            for name in ("id_rsa", "dir/id"):
                self.assertEqual(0o600, stat.S_IMODE(os.stat(os.path.join(root, name)).st_mode), root)
        self.assertSameTree(source, to)


if __name__ == "__main__":
    unittest.main()
