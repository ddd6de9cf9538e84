"""`reserve`: what must stay free on a backup's file system, whatever its own host does there."""

import os
import unittest

from tests.faults import tmpfs_or_skip
from tests.harness import Case, some_bytes, write_file

SIZE = 256 << 10
COUNT = 16
RESERVE = 4 << 20
ROOM = 16 << 20         # of the file system
LITTLE = 512 << 10      # more than what the bookkeeping on it may take


class ReserveTest(Case):
    """A backup on a small file system that its host uses too, with 4 of 16 MB in reserve; another with a size. The tests
    are one story; each begins with what it needs of the one before, unless that has run."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=1)
        cls.source = c.source("docs", "s", {"f%02d" % number: SIZE for number in range(COUNT)})
        cls.disk = c.path("disk")
        tmpfs_or_skip(cls, cls.disk, str(ROOM))
        c.backup("ba", "a", path=os.path.join(cls.disk, "backup"), reserve=RESERVE)
        c.backup("bb", "b", 4 * SIZE)
        c.start("s")
        c.settle(["a"])

    def data(self, size):
        """The host's own data on the backup's file system: this many bytes."""
        write_file(os.path.join(self.disk, "own"), b"\0" * size)

    def grown(self):
        """4 MB are in the backup, 4 are in reserve; so 8.8 are 0.8 too much: at least 4 files have to go, and that was said."""
        if not os.path.exists(os.path.join(self.disk, "own")):
            self.data(8 * (1 << 20) + 8 * LITTLE // 5)
            self.assertEqual((0, 0), self.moved(self.go("a")))

    def relieved(self):
        """The other has taken what does not fit here any more, and is full."""
        if not self.on("bb"):
            self.grown()
            self.go("b")
            self.go("a")

    def enlarged(self):
        """There was room again for four new files, and they are here."""
        if not os.path.exists(os.path.join(self.source, "new0")):
            self.relieved()
            self.data(0)
            for number in range(4):
                write_file(os.path.join(self.source, "new%d" % number), some_bytes(SIZE, number))
            self.assertEqual((0, 0), self.moved(self.go("b")))
            self.assertEqual((4, 0), self.moved(self.go("a")))

    def free(self):
        info = os.statvfs(self.disk)
        return info.f_bavail * info.f_frsize

    def on(self, backup):
        return {name for name, backups in self.c.copies_on_disk("docs").items() if backup in backups}

    def go(self, host):
        result = self.c.client(host)
        self.assertRc(0, result)
        self.assertEqual([], [name for name, there in self.c.copies_on_disk("docs").items() if not there and name[0] == "f"])
        self.assertWithinSize(self.c, "bb")
        return result.json

    def moved(self, figures):
        return figures["copied_files"], figures["dropped_files"]

    def assertStill(self):
        before = {name: self.c.kept_inodes(name) for name in self.c.backups}
        for host in "abab":
            figures = self.go(host)
            self.assertEqual((0, 0, 0), self.moved(figures) + (figures["wire_bytes"],), host)
        self.assertEqual(before, {name: self.c.kept_inodes(name) for name in self.c.backups})

    def test_1_when_the_hosts_data_grows_nothing_is_dropped_that_others_do_not_have(self):
        self.assertEqual(COUNT, len(self.on("ba")))
        self.grown()
        self.assertLess(self.free(), RESERVE)
        self.assertEqual((0, 0), self.moved(self.go("a")))
        self.assertEqual(COUNT, len(self.on("ba")))

    def test_2_others_take_what_it_has_to_give_up_and_no_more_and_then_it_gives_it_up(self):
        self.grown()
        taken, dropped = self.moved(self.go("b"))
        self.assertEqual(0, dropped)
        self.assertLessEqual(4, taken)
        self.assertEqual((0, taken), self.moved(self.go("a")))
        self.assertEqual((COUNT - taken, taken), (len(self.on("ba")), len(self.on("bb"))))
        self.assertGreaterEqual(self.free(), RESERVE)
        self.assertLess(self.free(), RESERVE + SIZE + LITTLE, "more was given up than needed")
        self.assertStill()

    def test_3_when_there_is_no_room_anywhere_the_reserve_is_used_and_nothing_is_lost(self):
        self.relieved()
        self.assertEqual(4, len(self.on("bb")), "the other is full")
        self.data(11 << 20)
        self.assertLess(self.free(), RESERVE)
        self.assertStill()

    def test_4_when_the_hosts_data_shrinks_it_may_take_more(self):
        self.enlarged()
        self.assertStill()

    def test_5_what_is_overserved_goes_at_once_and_only_as_much_as_needed(self):
        self.enlarged()
        # Two copies wanted for a while: all are on both, then one is enough.
        self.c.backups["bb"] = self.c.backups["bb"]._replace(options={"size": 64 * SIZE})
        self.c.keys["replicas"] = 2
        for _ in range(2):
            self.c.passes("ab")
        self.assertEqual((COUNT + 4, COUNT + 4), (len(self.on("ba")), len(self.on("bb"))))
        self.c.keys["replicas"] = 1
        self.assertStill()                              # there is room: they stay
        self.data(ROOM - (COUNT + 4) * SIZE - RESERVE)  # and now a little less than all of them needs
        copied, dropped = self.moved(self.go("a"))
        self.assertEqual(0, copied)
        self.assertIn(dropped, (1, 2, 3))
        self.assertGreaterEqual(self.free(), RESERVE)
        self.assertLess(self.free(), RESERVE + SIZE + LITTLE)
        self.assertStill()


if __name__ == "__main__":
    unittest.main()
