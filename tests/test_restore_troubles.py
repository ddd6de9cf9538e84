"""What a restore meets: disks that fail, things in the way, holders that lie, a killed run, a power cut. What can come back
does, once; what cannot is named with the true reason, and no holder is blamed for what happened here."""

import contextlib
import errno
import fcntl
import functools
import io
import os
import shutil
import unittest
from unittest import mock

import cbackup
from tests import recorder
from tests.disks import WHEN, DiskCase, row
from tests.faults import share_failing, tmpfs_or_skip
from tests.harness import Case, make_tree, read_file, tree, write_file

WORK = ".cbackup-restore"


class FromADiskTest(DiskCase):
    """Restores from a disk that is mounted here."""

    def in_this_process(self, disk, *options):
        """Restores; returns what was said on standard error."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(0, cbackup.main(self.words([disk], options=options)))
        return said.getvalue()

    def content(self, name):
        return read_file(os.path.join(self.to, name))

    def test_a_copy_that_was_updated_after_the_newest_catalog_comes_from_the_attic(self):
        disk = self.disk([row("d", "d"), row("d/f", content="v1"), row("g", content="g")], {"d/f": "version 2", "g": "g"})
        old = os.path.join(disk, ".cbackup/attic/docs/20250101T000000Z/d/f")
        make_tree(disk, {os.path.relpath(old, disk): b"v1"})
        os.utime(old, (WHEN, WHEN))
        for paths in ((), ("d",), ("d/f",)):
            with self.subTest(paths=paths):
                self.restored(disk, paths=paths)
                self.assertEqual(b"v1", self.content("d/f"))
                shutil.rmtree(self.to)

    def test_what_cannot_be_moved_aside_is_named_and_the_rest_is_restored(self):
        disk = self.disk([row("f", content="new"), row("z", content="z")], {"f": "new", "z": "z"})
        tmpfs_or_skip(self, os.path.join(self.to, "f"))
        result = self.restored(disk, rc=1, options=["--force"])
        self.assertOneError(result, "f: what is there cannot be moved aside")
        self.assertEqual(b"z", self.content("z"))

    def test_what_is_moved_aside_does_not_take_the_place_of_what_was_before(self):
        disk = self.disk([row("f", content="new")], {"f": "new"})
        make_tree(self.to, {"f": b"first"})
        real = cbackup.Target.check

        def check(target, staged, item):
            write_file(os.path.join(self.to, "f"), "written again meanwhile")
            return real(target, staged, item)
        with mock.patch.object(cbackup.Target, "check", check):
            self.in_this_process(disk, "--force")
        self.assertEqual(b"new", self.content("f"))
        aside = [name for name in self.back() if name.startswith(".cbackup-before-") and "/" in name]
        self.assertEqual({b"first", b"written again meanwhile"}, set(map(self.content, aside)))

    def test_what_nobody_has_is_not_moved_aside(self):
        disk = self.disk([row("f", content="new"), row("never copied", extra=None, content="abc"), row("z", content="z")], {"z": "z"})
        make_tree(self.to, {"f": b"old", "never copied": b"abd"})
        result = self.restored(disk, rc=1, options=["--force"])
        self.assertEqual({"f", "never copied", "z"}, self.back())
        for name in ("f", "never copied"):
            self.assertIn("cbackup: %s: its last known holders: other" % name, result.stderr)

    def test_a_file_without_a_digest_that_is_there_as_the_catalog_has_it_is_right(self):
        disk = self.disk([row("f", extra=None, content="abc")])
        make_tree(self.to, {"f": b"abc"})
        os.utime(os.path.join(self.to, "f"), (WHEN, WHEN))
        self.restored(disk)

    def test_below_what_is_in_the_way_of_a_directory_nothing_is_fetched(self):
        disk = self.disk([row("m", "d"), row("m/d", "d"), row("m/d/f", content="new"), row("n", content="n")],
                         {"m/d/f": "new", "n": "n"})
        make_tree(self.to, {"m": b"a file"})
        result = self.restored(disk, rc=1)
        self.assertIn("cbackup: m/d/f: m is not a directory\n", result.stderr)
        self.assertEqual([], [name for _, _, names in os.walk(os.path.join(self.to, WORK)) for name in names if name == "f"])

    def test_below_a_mount_point_in_the_target_files_and_links_come_as_well(self):
        rows = [row("m", "d"), row("m/f", content="new", mode=0o640), row("m/link", content="two", link=7),
                row("one", content="two", link=7), row("m/z", content="\0" * (3 << 20))]
        disk = self.disk(rows, {"m/f": "new", "one": "two", "m/z": b"\0" * (3 << 20)})
        tmpfs_or_skip(self, os.path.join(self.to, "m"))
        self.restored(disk)
        self.assertEqual({"m", "m/f", "m/link", "m/z", "one"}, self.back())
        self.assertEqual((b"new", b"two"), (self.content("m/f"), self.content("m/link")))
        info = os.stat(os.path.join(self.to, "m/f"))
        self.assertEqual((0o640, WHEN), (info.st_mode & 0o777, info.st_mtime))
        self.assertLess(os.stat(os.path.join(self.to, "m/z")).st_blocks, 1000, "a hole is no hole any more")
        self.restored(disk)     # finds all of it in place

    def test_a_second_run_makes_what_is_missing_in_directories_that_the_first_has_closed(self):
        rows = [row("d", "d", mode=0o500), row("d/f", content="f"), row("d/link", "l", "target"), row("d/h", content="h", link=3),
                row("x", content="h", link=3), row("d/sub", "d", mode=0o500), row("d/sub/y", content="y")]
        first = self.disk(rows, {"d/f": "f"}, "first")
        second = self.disk(rows, {"x": "h", "d/sub/y": "y"}, "second")
        if os.geteuid() == 0:
            for folder, _, _ in os.walk(self.base):
                os.chmod(folder, 0o777)
        user = 65534 if os.geteuid() == 0 else None
        self.restored(first, rc=1, user=user)
        os.chmod(os.path.join(self.to, "d"), 0o700)
        os.rmdir(os.path.join(self.to, "d/sub"))
        os.unlink(os.path.join(self.to, "d/link"))
        os.chmod(os.path.join(self.to, "d"), 0o500)
        self.restored(second, user=user)
        self.assertEqual({"d", "d/f", "d/link", "d/h", "d/sub", "d/sub/y", "x"}, self.back())
        for name in ("d", "d/sub"):
            self.assertEqual(0o500, os.stat(os.path.join(self.to, name)).st_mode & 0o777)

    def test_where_there_are_no_hard_links_there_are_copies(self):
        disk = self.disk([row(name, content="one", link=7) for name in ("a", "b", "c")], {"a": "one"})
        with mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, "Operation not permitted")):
            said = self.in_this_process(disk)
        self.assertEqual("cbackup: hard links could not be made (Operation not permitted): there are copies, 2 times\n", said)
        self.assertEqual([b"one"] * 3, [self.content(name) for name in "abc"])

    def test_a_file_where_the_working_directory_belongs_is_named(self):
        make_tree(self.to, {WORK: b"a file"})
        self.assertOneError(self.restored(self.disk([row("f")], {"f": ""}), rc=1), WORK, "is not a directory; remove it")

    def test_a_run_that_finds_nobody_leaves_what_one_before_it_has_begun(self):
        part = os.path.join(self.to, WORK, "files-x/.cbackup-part/large")
        make_tree(self.to, {os.path.relpath(part, self.to): b"part of a large file"})
        empty = os.path.join(self.base, "no catalog")
        make_tree(empty, {".cbackup/x": b""})
        self.assertOneError(self.restored(empty, rc=1), "has a catalog of docs")
        self.assertEqual(b"part of a large file", read_file(part))

    def test_a_target_that_cannot_get_its_own_time_is_named(self):
        disk = self.disk([row("", "d"), row("f", content="f")], {"f": "f"})
        real = os.utime

        def utime(path, *arguments, **more):
            if path == self.to:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            return real(path, *arguments, **more)
        with mock.patch.object(os, "utime", utime):
            said = self.in_this_process(disk)
        self.assertEqual("cbackup: metadata of directories could not be set (Operation not permitted), 1 times\n", said)

    def test_what_stays_of_its_working_directory_is_named_and_does_not_hold_the_source(self):
        work = os.path.join(self.to, WORK)
        tmpfs_or_skip(self, os.path.join(work, "files-x"))
        result = self.restored(self.disk([row("f", content="f")], {"f": "f"}))
        self.assertOneError(result, work + " could not be removed (Device or resource busy)")
        self.assertFalse(cbackup.restore_unfinished(os.fsencode(self.to)))

    def test_killed_while_it_clears_up_it_is_not_finished(self):
        work = cbackup.Work(self.base)
        work.make()
        work.mark()
        make_tree(work.path, {"files-x/f": b"1", "done.db": b"1", "zzz": b"1", "lock": b""})
        real, left = os.unlink, []

        def unlink(path, **more):
            real(path, **more)
            left.append(work.is_marked())
        with mock.patch.object(os, "unlink", unlink):
            self.assertEqual("", work.remove())
        self.assertEqual([True] * 3 + [False], [left[0], left[1], left[2], left[-1]])
        self.assertFalse(os.path.exists(work.path))

    def test_names_that_differ_only_in_case_are_found_in_one_go(self):
        plan = cbackup.Plan(self.base)
        self.addCleanup(plan.close)
        names = [b"%s/%d" % (name, number) for number in range(50) for name in (b"a", b"A", b"b")]
        plan.load([[cbackup.CatalogRow(name, "f") for name in names]], cbackup.Asked())
        with mock.patch.object(cbackup, "fold_key", side_effect=cbackup.fold_key) as asked:
            alike = list(plan.alike())
        self.assertEqual([[(b"A/%d" % number, "f"), (b"a/%d" % number, "f")] for number in sorted(range(50), key=str)], alike)
        self.assertLess(asked.call_count, 5 * len(names))

    def test_a_lock_that_the_restore_before_took_away_is_none(self):
        work = cbackup.Work(self.base)
        work.make()
        real = fcntl.flock

        def flock(*arguments):
            work.remove()
            return real(*arguments)
        with mock.patch.object(fcntl, "flock", flock), self.assertRaisesRegex(cbackup.CBackupError, "another restore"):
            with work.locked():
                self.fail("locked")


class FailingTargetTest(Case):
    """A source with copies on a and b; the calls of a restore may be made to fail."""

    @classmethod
    def setUpClass(cls):
        share_failing(cls, "90M")
        make_tree(cls.source, {"large": 3 << 20})
        cls.c.start()
        cls.c.passes("ab")
        cls.c.kill("s")
        cls.number = 0

    def setUp(self):
        FailingTargetTest.number += 1
        self.to = self.c.path("to%d" % self.number)
        self.addCleanup(self.calls.heal)

    def restored(self, rc=0):
        result = self.c.restore("a", "docs", to=self.to)
        self.assertRc(rc, result)
        if rc == 0:
            self.assertSameTree(self.source, self.to)
        return result

    UNWRITTEN, UNREAD = "d1/f4", "d2/f5"

    @classmethod
    @functools.lru_cache(None)
    def without_two(cls):
        """(Result, the missing names, where) of a restore in which one file could not be written and one not be read again;
        and the Result of the next one. Made once for the class."""
        to = cls.c.path("without two")
        cls.calls.fail("write,pwrite", errno.EIO, "*/files-*/" + cls.UNWRITTEN)
        cls.calls.fail("read,pread", errno.EIO, "*/files-*/" + cls.UNREAD)
        try:
            first = cls.c.restore("a", "docs", to=to)
        finally:
            cls.calls.heal()
        missing = set(tree(cls.source)) - set(tree(to))
        return first, missing, to, cls.c.restore("a", "docs", to=to)

    def assertOnlyMissing(self):
        """Just these files are not restored, and nobody is blamed; the next run has them."""
        first, missing, to, second = self.without_two()
        self.assertRc(1, first)
        self.assertEqual(["cbackup: %s: Input/output error" % path for path in (self.UNWRITTEN, self.UNREAD)],
                         sorted(first.error_lines))
        self.assertEqual({self.UNWRITTEN, self.UNREAD}, missing)
        self.assertRc(0, second)
        self.assertSameTree(self.source, to)

    def test_a_file_that_cannot_be_written_costs_no_other(self):
        self.assertOnlyMissing()

    def test_a_file_that_cannot_be_read_again_is_not_the_holders_fault(self):
        self.assertOnlyMissing()

    def test_a_disk_that_takes_nothing_is_named(self):
        self.calls.fail("write,pwrite", errno.EIO, "*/files-*")
        self.assertOneError(self.restored(rc=1), self.to, "Input/output error")
        self.calls.heal()
        self.restored()

    def test_a_disk_too_full_for_the_catalog_is_named(self):
        self.calls.fail("write,pwrite", errno.ENOSPC, "*/catalog-*")
        self.assertOneError(self.restored(rc=1), self.to, "is full")

    def test_files_of_a_run_before_a_power_cut_are_not_believed(self):
        """Size and time have come to the disk, the bytes have not."""
        for name in ("d1/f4", "large"):
            info = os.stat(os.path.join(self.source, name))
            for holder in "ab":
                torn = "%s/files-b%s/%s" % (WORK, holder, name)
                make_tree(self.to, {torn: b"\0" * info.st_size})
                os.utime(os.path.join(self.to, torn), ns=(info.st_mtime_ns,) * 2)
        self.assertEqual("", self.restored().stderr)


@unittest.skipUnless(recorder.possible(), "this system does not tell the path of an open file")
class DurableTest(Case):
    """What a restore notes as done, for the next one to believe, is on the disk by then."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=2)
        recorder.record(cls, cls.c)
        cls.source = cls.c.source("docs", "s", {"d%d/f%d" % (n % 3, n): 3000 + n for n in range(12)})
        make_tree(cls.source, {"large": 3 << 20})
        for host in "ab":
            cls.c.backup("b" + host, host, "90M")
        cls.c.start()
        cls.c.passes("ab")
        cls.c.kill("s")

    def commits(self, to):
        """For each time that something was noted as done: what of the files in place was in doubt then."""
        disk, placed, found = recorder.Disk(to), {}, []
        for event in recorder.events(self.c):
            if event.what == "rename" and event.new.startswith(to + "/") and "/files-" in event.old:
                disk.arrived(event.old, event.at)
                placed[event.new] = event.thread
            disk.follow(event)
            if event.what == "commit" and event.path.startswith(to + "/") and event.path.endswith("/done.db") \
                    and any(sql.startswith("INSERT") for sql in event.changed):
                found.append([path for path in list(disk.names) + list(disk.bytes) if placed.get(path) == event.thread])
        return found

    def restored(self, name, **more):
        to = self.c.path(name)
        self.assertRc(0, self.c.restore("a", "docs", to=to, **more))
        self.assertSameTree(self.source, to)
        return to

    def test_by_one_sync_for_a_batch(self):
        to = self.restored("to")
        self.assertEqual([], [doubts for doubts in self.commits(to) if doubts])
        syncs = [event for event in recorder.events(self.c) if event.what in ("fsync", "syncfs") and event.path.startswith(to)]
        self.assertTrue(self.commits(to))
        self.assertLess(len(syncs), len(self.commits(to)) + 5)

    def test_without_such_a_call_nothing_is_noted(self):
        self.assertEqual([], self.commits(self.restored("without", CBACKUP_RECORD_SYNCFS="no")))


class Holder:
    """A holder of a plan, in this process: `deliver(path, into)` is asked for each file."""

    key, name, backup = "x", "x on x", "x"

    def __init__(self, deliver, how="done"):
        self.deliver, self.how, self.asked = deliver, how, 0

    def fetch(self, source, names, into, most, on_bytes, whole=False):
        self.asked += 1
        if self.asked > 50:
            raise AssertionError("it is asked again and again")
        for path, _ in names:
            self.deliver(os.path.join(into, path).decode())
        on_bytes(2 << 20)
        return cbackup.Pull(12, self.how, [] if self.how == "done" else ["connection closed"])


class LyingHolderTest(Case):
    """Of what one holder does, to a Schedule without servers."""

    def schedule(self, holder, rows=("f",)):
        base = self.directory()
        work = cbackup.Work(base)
        work.make()
        plan = cbackup.Plan(work.path)
        self.addCleanup(plan.close)
        plan.load([[cbackup.CatalogRow(path.encode(), "f", 4, 1, digest=b"x" * 32) for path in rows]], cbackup.Asked())
        plan.enter_holdings(0, [(path.encode(), b"", 4, 1, None) for path in rows])
        plan.match()
        schedule = cbackup.Schedule("docs", plan, cbackup.Holders("docs", [holder]), cbackup.Progress(True))
        target = cbackup.Target(base, False, cbackup.Progress(True))
        opened = target.opened()
        opened.__enter__()
        self.addCleanup(opened.__exit__, None, None, None)
        done = cbackup.Done(work.path)
        self.addCleanup(done.close)
        return schedule, plan, target, done

    @staticmethod
    def wrong(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, "lies")

    def test_one_that_sends_nothing_but_rubbish_for_ever_is_given_up(self):
        holder = Holder(self.wrong, "cut")
        schedule, plan, target, done = self.schedule(holder)
        with mock.patch.object(cbackup.time, "sleep"), self.assertLogs("cbackup", "WARNING"):
            schedule.fetch_all(target, done, (0, 1))
        self.assertLess(holder.asked, 10)

    def test_what_another_one_has_put_into_place_stays_so_whatever_a_slow_one_delivers(self):
        schedule, plan, target, done = self.schedule(Holder(self.wrong), ("f", "g"))
        schedule.plan.open_all()
        schedule._target, schedule._done = target, done
        flight = schedule.flights[0]
        batch = schedule._next_batch(flight)
        for item in batch:
            self.wrong(os.path.join(target.path, WORK, "files-x", item.path.decode()))
        flight.checking, flight.fetching = flight.fetching, {}
        plan.settle([b"f"])     # as the other one does
        del flight.checking[b"f"]
        with self.assertLogs("cbackup", "WARNING") as said:
            schedule._take(flight, batch, cbackup.Pull(), cbackup.RESTORE_DIR + b"/files-x")
        self.assertEqual([1, 0], [state for _, _, state, _ in plan.each("files and their states")])
        self.assertEqual(1, len(said.output), said.output)
        self.assertIn("the copy of g is damaged", said.output[0])


class SeveralPlacesTest(unittest.TestCase):
    """One batch from a server: files under their own paths, and those that it has under others."""

    def holder(self, *outcomes):
        link = mock.Mock(host="a")
        holder = cbackup.RemoteHolder(link, "ba", [], None)
        holder._pull = mock.Mock(side_effect=outcomes)
        return holder

    def test_a_failure_of_the_first_is_not_forgotten_over_the_second(self):
        holder = self.holder(cbackup.Pull(12, "cut", ["connection closed"]), cbackup.Pull())
        outcome = holder.fetch("docs", [(b"f", b""), (b"g", b"/old name")], b"/nowhere/into", 5, lambda count: None)
        self.assertEqual(("cut", ["connection closed"], 1), (outcome.how, outcome.errors, holder._pull.call_count))

    def test_a_file_in_a_directory_of_any_name_is_not_taken_for_another(self):
        holder = self.holder(cbackup.Pull(), cbackup.Pull())
        with mock.patch.object(cbackup, "Tree"):
            holder.fetch("docs", [(b".elsewhere/f", b""), (b"g", b"/f")], b"/nowhere/files-ba", 5, lambda count: None)
        first, second = [call[0][3] for call in holder._pull.call_args_list]
        self.assertNotEqual(first, second)
        self.assertFalse(second.startswith(first + b"/"), second)
