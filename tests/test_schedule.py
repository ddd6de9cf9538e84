"""Which holder fetches what next in a restore, with holders that are made up."""

import os
import threading
import unittest
import unittest.mock

import cbackup

from tests.harness import Case, read_file, write_file


def digest(data):
    found = cbackup.new_digest()
    found.update(data)
    return found.digest()


class MadeUpHolder:
    """A backup whose batches do what a test says: each of `does` is called with (paths, a function that delivers one,
    a function to be called with bytes) and returns what is wrong; when there are no more, everything is delivered."""

    def __init__(self, name, files, *does):
        self.name = self.key = self.backup = name
        self.files, self.does, self.batches, self.catalogs = files, list(does), [], []

    def fetch(self, source, names, into, most, on_bytes, whole=False):
        os.makedirs(into, exist_ok=True)
        paths = [path for path, _ in names]
        self.batches.append(paths)

        def deliver(path, data=None):
            write_file(os.path.join(into, path), self.files[path] if data is None else data)
            on_bytes(len(self.files[path]))
        if self.does:
            return self.does.pop(0)(paths, deliver, on_bytes) or cbackup.Pull()
        for path in paths:
            deliver(path)
        return cbackup.Pull()


class ScheduleTest(Case):

    def setUp(self):
        self.base = self.directory()
        self.work = cbackup.Work(self.base)
        self.work.make()
        self.plan = cbackup.Plan(self.work.path)
        self.addCleanup(self.plan.close)
        self.done = cbackup.Done(self.work.path)
        self.addCleanup(self.done.close)
        self.target = cbackup.Target(self.base, False, cbackup.Progress(True))

    def want(self, files, *holders):
        """A plan of these files, of which all holders have all."""
        self.plan.load([[cbackup.CatalogRow(path, "f", len(data), 10 ** 18, 0o644, digest=digest(data))
                         for path, data in sorted(files.items())]], cbackup.Asked())
        for number in range(len(holders)):
            self.plan.enter_holdings(number, [(path, b"", len(data), 10 ** 18, digest(data))
                                              for path, data in files.items()])
        self.plan.match()
        self.holders = cbackup.Holders("docs", holders)
        self.schedule = cbackup.Schedule("docs", self.plan, self.holders, cbackup.Progress(True))

    def fetch(self):
        with self.target.opened():
            self.schedule.fetch_all(self.target, self.done, (0, 1))

    def assertThere(self, files):
        for path, data in files.items():
            self.assertEqual(data, read_file(os.path.join(os.fsencode(self.base), path)))
        self.plan.end()
        self.assertEqual((0, 0), self.plan.count("missing"))

    def test_the_next_batch_is_on_its_way_while_the_last_one_is_checked(self):
        files = {b"large %d" % number: b"%d" % number * (9 << 20) for number in range(3)}
        second, held = threading.Event(), []
        check = self.target.check

        def slow_check(staged, item):
            held.append(second.wait(10))
            return check(staged, item)
        self.target.check = slow_check

        def begin(paths, deliver, on_bytes):
            second.set()
            return [deliver(path) for path in paths] and None
        holder = MadeUpHolder("b", files, lambda paths, deliver, _: [deliver(path) for path in paths] and None, begin)
        self.want(files, holder)
        self.fetch()
        self.assertEqual([True] * 3, held)
        self.assertThere(files)
        self.assertEqual((3, 27 << 20), (self.schedule.files, self.schedule.bytes))

    def test_what_is_checked_cannot_be_written_to_by_the_next_batch(self):
        files = {b"large %d" % number: b"%d" % number * (9 << 20) for number in range(3)}
        meddled, place = threading.Event(), self.target.place

        def placed_late(*rest):
            self.assertTrue(meddled.wait(30))
            return place(*rest)
        self.target.place = placed_late

        def meddle(paths, deliver, _):
            for path in holder.batches[0]:
                deliver(path, b"e" * (9 << 20))
            meddled.set()
            return [deliver(path) for path in paths] and None
        holder = MadeUpHolder("b", files, lambda paths, deliver, _: [deliver(path) for path in paths] and None, meddle)
        self.want(files, holder)
        self.fetch()
        self.assertThere(files)

    def test_a_small_file_that_lies_torn_because_the_line_was_cut_is_not_called_damaged(self):
        files = {b"a": b"a" * 5000, b"b": b"b" * 5000}

        def cut(paths, deliver, _):
            deliver(b"a")
            deliver(b"b", b"b" * 77)
            return cbackup.Pull(code=12, how="cut", errors=["connection unexpectedly closed"])
        holder = MadeUpHolder("b", files, cut)
        self.want(files, holder)
        with unittest.mock.patch.object(cbackup.log, "warning") as warning:
            self.fetch()
        warning.assert_not_called()
        self.assertEqual([[b"a", b"b"], [b"b"]], holder.batches)
        self.assertThere(files)

    def test_a_copy_that_came_whole_and_is_wrong_is_called_damaged_and_not_asked_for_again(self):
        files = {b"a": b"a" * 5000}
        holder = MadeUpHolder("b", files, lambda paths, deliver, _: deliver(b"a", b"b" * 5000))
        self.want(files, holder)
        with self.assertLogs("cbackup", "WARNING") as said:
            self.fetch()
        self.assertEqual(["b: the copy of a is damaged; taking another"],
                         [record.getMessage() for record in said.records])
        self.assertEqual([[b"a"]], holder.batches)
        self.plan.end()
        self.assertEqual((1, 5000), self.plan.count("missing"))

    def test_when_one_cannot_go_on_the_others_end_too(self):
        files = {b"large %d" % number: b"%d" % number * (2 << 20) for number in range(4)}
        begun = threading.Event()

        def waits(paths, deliver, on_bytes):
            begun.set()
            while True:  # ends when it is told that nobody needs it
                threading.Event().wait(0.01)
                on_bytes(0)

        def full(paths, deliver, on_bytes):
            begun.wait(30)
            return cbackup.Pull(code=11, how="own", errors=["write failed: No space left on device (28)"])
        self.want(files, MadeUpHolder("b0", files, full), MadeUpHolder("b1", files, waits))
        with self.assertRaisesRegex(cbackup.CBackupError, "is full: write failed"):
            self.fetch()

    def test_a_part_is_gone_on_with_where_the_line_is_slower_than_comparing(self):
        flight = cbackup.Flight(0)
        flight.asked, flight.parts = 1 << 30, 100 << 20
        for rate, whole in ((None, False), (5 << 20, False), (110 << 20, True)):
            flight.rate = rate
            self.assertEqual(whole, cbackup.Schedule._is_quicker_whole(flight))
        flight.parts = 1000 << 20
        self.assertFalse(cbackup.Schedule._is_quicker_whole(flight))


if __name__ == "__main__":
    unittest.main()
