"""Restore: what a machine that has lost everything gets back, from whichever hosts are up."""

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import types
import unittest

from tests.harness import DIRECTORY, Case, Link, inodes, make_tree, read_file, some_bytes, tree, write_file


LEFT_FOR_THE_NEXT = ".cbackup-restore"      # in the target, until a restore is complete
LARGE = (1 << 20) + 5000                    # what is sent in another way than small files


def family_photos():
    """A source with some of everything."""
    files = {"20%02d/%02d/img %d.jpg" % (number % 7, number % 12, number): 300 + 37 * number for number in range(24)}
    files.update({"empty": b"", "void": DIRECTORY, "a/b/c/void": DIRECTORY, "latest": Link("2001/01"),
                  "gone": Link("x/y"), "etc": Link("/etc"), b"odd \xff\n name*": b"odd", "-rf": b"dash",
                  "large": LARGE, "same 1": b"twice the same", "same 2": b"twice the same", "tool": b"#!/bin/sh\n"})
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
        for number, order in enumerate(("ab", "bc", "cab")):
            make_tree(cls.source, dict(files[number::3]))
            if order == "cab":      # all three get the last catalog
                os.chmod(os.path.join(cls.source, "tool"), 0o751)
                os.chmod(os.path.join(cls.source, "2001"), 0o500)
                os.utime(os.path.join(cls.source, "2001/01"), ns=(1, 1234567890123456789))
                os.utime(os.path.join(cls.source, "gone"), ns=(1, 1234567890987654321), follow_symlinks=False)
            cls.c.passes(order)
        cls.c.kill("s")
        cls.holders = cls.c.copies_on_disk("photos")
        cls.tree = tree(cls.source)
        cls.machines = 0

    @classmethod
    def machine(cls):
        """A machine with nothing but cbackup.conf and cluster.pem; returns its name."""
        cls.machines += 1
        name = "fresh%d" % cls.machines
        cls.c.fresh_home(name)
        return name

    def kill_for_this_test(self, *hosts):
        self.c.kill(*hosts)
        self.addCleanup(self.c.start, *hosts)

    @classmethod
    def attempt(cls, *paths, machine=None, to=None, **more):
        """Restores the source on a fresh machine; returns what became of it."""
        machine = machine or cls.machine()
        to = to or cls.c.path(machine, "restored")
        result = cls.c.restore(machine, "photos", *paths, to=to, **more)
        return types.SimpleNamespace(machine=machine, to=to, result=result, back=cls.what_is_back(to))

    def restored(self, *paths, rc=0, **more):
        """The same, and it must end with `rc`; returns (where, Result)."""
        done = self.attempt(*paths, **more)
        self.assertRc(rc, done.result)
        return done.to, done.result

    @staticmethod
    def what_is_back(to):
        """tree(to) without what an incomplete restore keeps there for the next run to go on with."""
        return {name: entry for name, entry in tree(to).items() if name.split(os.sep)[0] != LEFT_FOR_THE_NEXT} \
            if os.path.isdir(to) else {}

    @classmethod
    def copies_of(cls, name):
        return [cls.c.kept_as(backup, "photos", name) for backup in cls.holders[name]]

    @classmethod
    def kept(cls):
        return [cls.c.kept_inodes(backup) for backup in ("ba", "bb", "bc")]

    @classmethod
    @functools.lru_cache(None)
    def complete(cls):
        """A restore with all backups up, into a target that is a symlink, made once for the class."""
        machine = cls.machine()
        home, real, before = os.listdir(cls.c.home(machine)), cls.c.path(machine, "real"), cls.kept()
        os.mkdir(real)
        os.symlink(real, real + ".link")
        done = cls.attempt(machine=machine, to=real + ".link")
        done.home, done.real, done.before, done.after = home, real, before, cls.kept()
        return done

    @classmethod
    @functools.lru_cache(None)
    def with_fewer_and_fewer(cls):
        """{"a", "ab", "abc": what became of a restore with these hosts down}, made once for the class."""
        found, down = {}, ""
        try:
            for host in "abc":
                cls.c.kill(host)
                down += host
                found[down] = cls.attempt()
        finally:
            cls.c.start(*down)
        return found


class OntoAFreshMachine(RestoreCase):
    """With the source's host and any one backup host gone, everything is back as it was."""

    def test_with_all_backups_up(self):
        done = self.complete()
        self.assertRc(0, done.result)
        self.assertSameTree(self.tree, done.real)
        self.assertEqual("", done.result.stderr)

    def test_with_backup_a_gone(self):
        done = self.with_fewer_and_fewer()["a"]
        self.assertRc(0, done.result)
        self.assertSameTree(self.tree, tree(done.to))

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
        done = self.complete()
        self.assertRc(0, done.result)
        self.assertEqual(done.before, done.after)

    def test_a_restore_needs_no_free_name_in_the_cluster(self):
        # The machine's name is not in the configuration, and it has no `host` file: see fresh_home().
        done = self.complete()
        self.assertEqual({"cbackup.conf", "cluster.pem"}, set(done.home))
        self.assertRc(0, done.result)


class Missing(RestoreCase):
    """What cannot be had is listed, each file with its reason; the rest is restored, and a second run gets the rest."""

    def test_what_is_missing_is_named_and_a_second_run_gets_it(self):
        lost = {name for name, holders in self.holders.items() if holders == ["ba", "bb"]}
        self.assertTrue(lost, "not a test: nothing is only on a and b")
        first = self.with_fewer_and_fewer()["ab"]
        self.assertRc(1, first.result)
        for name in lost:
            # Names that no terminal can show are shown in some other way.
            shown = name if name.isprintable() else "odd "
            lines = [line for line in first.result.text.splitlines() if " %s" % shown in line]
            self.assertEqual(1, len(lines), "%r is not listed, or more than once: %s" % (name, first.result))
            self.assertTrue("ba" in lines[0] or "bb" in lines[0] or " a" in lines[0], lines[0])
        self.assertSameTree({name: entry for name, entry in self.tree.items() if name not in lost},
                            first.back, ["dir.mtime_ns"])
        before = inodes(first.to)
        self.restored(machine=first.machine, to=first.to)
        self.assertSameTree(self.tree, first.to)
        after = inodes(first.to)
        self.assertEqual([], [name for name in before if name in self.holders and before[name] != after[name]],
                         "files that were there already are not fetched again")

    def test_files_that_are_not_there_at_all_are_not_left_half_done(self):
        done = self.with_fewer_and_fewer()["ab"]
        self.assertRc(1, done.result)
        self.assertEqual([], [name for name in done.back if name not in self.tree])

    def test_with_no_backup_up_nothing_is_restored_and_the_hosts_are_named(self):
        done = self.with_fewer_and_fewer()["abc"]
        self.assertRc(1, done.result)
        for host in "abc":
            self.assertRegex(done.result.stderr, r"\b%s\b" % host)
        self.assertFalse(done.back)

    def test_a_restore_that_is_killed_is_continued_by_the_next(self):
        machine = self.machine()
        to = self.c.path(machine, "restored")
        process = self.c.spawn(machine, "restore", "photos", "--to", to)
        while not process.ends_within(0.002) and sum(len(names) for _, _, names in os.walk(to)) < 20:
            pass
        process.kill()
        self.restored(machine=machine, to=to)
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
        for path in self.todays(("2001", "2001/"), 1):
            self.assertRestored(lambda name: (name + "/").startswith("2001/"), path)

    @classmethod
    @functools.lru_cache(None)
    def several(cls):
        """(where, Result) of a restore of some paths, with --to behind them."""
        machine = cls.machine()
        to = cls.c.path(machine, "to")
        return to, cls.c.run(machine, "restore", "photos", "tool", "2002", "gone", "--to", to)

    def test_several(self):
        to, result = self.several()
        self.assertRc(0, result)
        wanted = {name: entry for name, entry in self.tree.items()
                  if (name + "/").startswith("2002/") or name in ("tool", "gone")}
        self.assertSameTree(wanted, to, ["dir.mtime_ns", "dir.mode"])

    def test_as_the_manual_has_it_with_to_behind(self):
        to, result = self.several()
        self.assertRc(0, result)
        self.assertEqual({"tool", "2002", "gone"}, set(os.listdir(to)))

    def test_a_path_that_is_not_in_the_source_is_named_and_the_others_are_restored(self):
        to, result = self.restored("tool", "no such thing", rc=1)
        self.assertIn("no such thing", result.stderr)
        self.assertEqual({"tool"}, set(self.what_is_back(to)))

    def test_a_path_that_leads_out_is_refused(self):
        done = self.attempt("../photos", "2001/../../..", "/etc/passwd")
        self.assertRc(1, done.result)
        self.assertOneError(done.result, "nothing in photos matches ../photos, 2001/../../.., etc/passwd\n")
        self.assertFalse(done.back)

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

    @staticmethod
    def corrupt(later, path, truncate=False):
        """Changes bytes of a copy, but not its size and time; later() is told how to put it right."""
        content, info = read_file(path), os.stat(path)

        def put(new):
            with open(path, "r+b") as file:
                file.truncate(len(new))
                file.write(new)
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        later(put, content)
        put(content[:len(content) // 2] if truncate else bytes([content[0] ^ 1]) + content[1:])

    @staticmethod
    def put_away(later, path):
        os.rename(path, path + ".away")
        later(os.rename, path + ".away", path)

    def test_corrupted_copies_in_one_backup_are_replaced_by_those_of_another(self):
        for backup in self.todays(("ba", "bb", "bc"), 1):
            for name, holders in self.holders.items():
                if backup in holders and os.path.getsize(os.path.join(self.source, name)):
                    self.corrupt(self.addCleanup, self.c.kept_as(backup, "photos", name))
            self.assertSameTree(self.tree, self.restored()[0])
            self.doCleanups()

    IN_ALL, LINKED = "2004/04/img 4.jpg", "2005/05/img 5.jpg"

    @classmethod
    @functools.lru_cache(None)
    def with_bad_copies(cls):
        """A restore with one truncated or missing copy of each file in 2003, only bad ones of IN_ALL, and symlinks in place of
        those of LINKED."""
        with contextlib.ExitStack() as stack:
            for number, name in enumerate(name for name in cls.holders if name.startswith("2003/")):
                path = cls.copies_of(name)[number % 2]
                if number % 3:
                    cls.corrupt(stack.callback, path, truncate=True)
                else:
                    cls.put_away(stack.callback, path)
            for path in cls.copies_of(cls.IN_ALL):
                cls.corrupt(stack.callback, path)
            secret = cls.c.path("secret")
            for path in cls.copies_of(cls.LINKED):
                write_file(secret, read_file(path))
                cls.put_away(stack.callback, path)
                os.symlink(secret, path)
            done = cls.attempt()
        return done

    def test_truncated_and_missing_copies_are_replaced_too(self):
        done = self.with_bad_copies()
        self.assertSameTree(*({name: entry for name, entry in found.items() if name.startswith("2003/")}
                              for found in (self.tree, done.back)), ["dir.mtime_ns"])

    def test_a_file_of_which_every_copy_is_bad_is_named_and_not_restored(self):
        done = self.with_bad_copies()
        self.assertRc(1, done.result)
        self.assertIn(self.IN_ALL, done.result.text)
        self.assertSameTree({other: entry for other, entry in self.tree.items() if other not in (self.IN_ALL, self.LINKED)},
                            done.back, ["dir.mtime_ns"])

    def test_a_copy_that_became_a_symlink_is_not_followed(self):
        done = self.with_bad_copies()
        self.assertRc(1, done.result)
        self.assertIn(self.LINKED, done.result.text)
        self.assertFalse(os.path.lexists(os.path.join(done.to, self.LINKED)))


class WhatIsInTheWay(RestoreCase):
    """Nothing is written outside the target or over what differs, unless that was asked for."""

    MINE = {"tool": b"my own work", "2003/03/img 3.jpg": b"my own picture", "gone": b"no link any more"}
    OTHERS = {"same 1/mine": b"1", "2002": b"2"}       # a directory where a file belongs, and the reverse

    @classmethod
    def outside(cls):
        path = cls.c.path("outside")
        return inodes(path), tree(path), os.stat(path).st_mtime_ns, os.stat(path).st_mode

    @classmethod
    @functools.lru_cache(None)
    def over_what_is_there(cls):
        """What was outside of a target with symlinks to there, and files and directories that do not belong there; and what
        became of a restore over it, and then of one with --force."""
        outside, to = cls.c.path("outside"), cls.c.path("in the way", "target")
        make_tree(outside, {"victim": b"precious"})
        make_tree(to, {"2001": Link(outside), "a/b": Link(outside), "same 2": Link(outside + "/victim"),
                       "empty": Link(outside + "/new"), "void": Link(outside), "my own file": b"mine", **cls.MINE, **cls.OTHERS})
        before, runs = cls.outside(), []
        for options in ([], ["--force"]):
            runs.append(cls.attempt(to=to, options=options))
            runs[-1].outside = cls.outside()
        return (before, *runs)

    def test_nothing_is_written_through_symlinks_in_the_target(self):
        before, refused, forced = self.over_what_is_there()
        for rc, done in ((1, refused), (0, forced)):
            self.assertRc(rc, done.result)
            self.assertEqual(before, done.outside, done.result)

    def test_a_target_that_is_a_symlink_itself_is_what_the_user_said(self):
        done = self.complete()
        self.assertRc(0, done.result)
        self.assertTrue(os.path.islink(done.to))
        self.assertSameTree(self.tree, done.real)

    def test_identical_files_are_kept_as_they_are(self):
        to = self.complete().real
        before = inodes(to)
        self.assertSameTree(self.tree, to)
        self.restored(to=to)
        self.assertEqual(before, inodes(to))

    def test_identical_bytes_get_their_modes_and_times_without_being_fetched(self):
        to = os.path.join(self.directory(), "target")
        make_tree(to, {"large": some_bytes(LARGE, "large"), "tool": b"#!/bin/sh\n"})
        before = os.stat(os.path.join(to, "large")).st_ino
        self.restored("large", "tool", to=to)
        self.assertEqual(before, os.stat(os.path.join(to, "large")).st_ino)
        self.assertSameTree({name: self.tree[name] for name in ("large", "tool")}, to)

    def test_differing_files_are_refused_by_name_and_the_rest_is_restored(self):
        _, done, _ = self.over_what_is_there()
        self.assertRc(1, done.result)
        for name, content in {**self.MINE, "my own file": b"mine"}.items():
            self.assertEqual(hashlib.sha256(content).hexdigest(), done.back[name].digest, name)
        for name in self.MINE:
            self.assertIn(name, done.result.stderr)
        self.assertIn("--force", done.result.stderr)
        for name, entry in self.tree.items():
            if name.split("/")[0] not in ("2001", "2002", "same 1", "same 2", "empty") and name not in self.MINE \
                    and entry.kind == "file":
                self.assertEqual(entry.digest, done.back[name].digest, name)

    def test_with_force_they_are_replaced_and_kept_aside(self):
        _, _, done = self.over_what_is_there()
        self.assertRc(0, done.result)
        for name, entry in self.tree.items():
            if entry.kind != "dir":
                self.assertEqual(entry, done.back[name], name)
        contents = [read_file(os.path.join(folder, name)) for folder, _, names in os.walk(os.path.dirname(done.to))
                    for name in names if not os.path.islink(os.path.join(folder, name))]
        for content in [*self.MINE.values(), *self.OTHERS.values(), b"mine"]:
            self.assertEqual(1, contents.count(content), content)

    def test_a_directory_where_a_file_belongs_and_the_reverse_are_named(self):
        _, done, _ = self.over_what_is_there()
        self.assertRc(1, done.result)
        for name, content in self.OTHERS.items():
            self.assertEqual(hashlib.sha256(content).hexdigest(), done.back[name].digest, name)
            self.assertIn(name.split("/")[0], done.result.stderr)
        self.assertEqual(self.tree["large"].digest, done.back["large"].digest)


class RestoreTest(OntoAFreshMachine, Missing, Paths, BadCopies, WhatIsInTheWay):
    """All of these with one cluster: it takes longer to make than most of them."""


del OntoAFreshMachine, Missing, Paths, BadCopies, WhatIsInTheWay        # not to be run each for itself


class AfterChangesTest(Case):
    """What is restored is the source as the last passes knew it. Of three hosts only a is up."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b")
        cls.docs = c.source("docs", "s", {"f%d" % number: 100 for number in range(12)})
        cls.small = c.source("small", "s", {"f": b"1", "g": b"2"})
        cls.keys = c.source("keys", "s", {"id_rsa": b"secret", "dir/id": b"secret"})
        for name in ("id_rsa", "dir/id"):
            os.chmod(os.path.join(cls.keys, name), 0o600)
        os.chmod(os.path.join(cls.keys, "dir"), 0o700)
        c.source("large", "s", {"small": 100, "too large": LARGE})
        for host in "ab":
            c.backup("b" + host, host, "1M")
        c.start()
        c.passes("ab")
        write_file(os.path.join(cls.docs, "f1"), "changed")
        os.chmod(os.path.join(cls.docs, "f2"), 0o600)
        os.unlink(os.path.join(cls.docs, "f3"))
        make_tree(cls.docs, {"new/f": b"new", "newer": DIRECTORY, "link": Link("f1")})
        c.passes("ba")
        c.kill("s", "b")
        c.fresh_home("fresh")

    def restored(self, source, rc=0):
        to = self.c.path("restored", source)
        result = self.c.restore("fresh", source, to=to)
        self.assertRc(rc, result)
        return to, result

    def test_changed_and_deleted_files_are_restored_as_they_were_last(self):
        to, _ = self.restored("docs")
        self.assertSameTree(self.docs, to)
        self.assertEqual((b"changed", False), (read_file(to + "/f1"), os.path.exists(to + "/f3")))

    def test_a_file_that_never_got_a_copy_is_missing_and_named(self):
        to, result = self.restored("large", rc=1)
        self.assertIn("too large", result.text)
        self.assertEqual({"small"}, set(os.listdir(to)) - {LEFT_FOR_THE_NEXT})

    def test_with_the_sources_host_up_a_restore_works_as_well(self):
        self.c.start("s")
        self.addCleanup(self.c.kill, "s")
        before = tree(self.small)
        os.unlink(os.path.join(self.small, "f"))
        self.assertRc(0, self.c.restore("s", "small", "f"))
        self.assertEqual(before["f"], tree(self.small)["f"])

    def test_a_private_file_has_never_been_open_to_others(self):
        to, _ = self.restored("keys")
        for root in (to, self.c.kept_as("ba", "keys")):
            for name in ("id_rsa", "dir/id"):
                self.assertEqual(0o600, stat.S_IMODE(os.stat(os.path.join(root, name)).st_mode), root)
        self.assertSameTree(self.keys, to)


if __name__ == "__main__":
    unittest.main()
