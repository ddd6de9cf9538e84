"""The power fails: what lies on a backup's disk at any instant is whole, as far as a server counts it.

The disk is an image on a loop device; what the file system has not written to it yet is not in the image, as it would not be on
a disk. A copy of the image is therefore what a power failure leaves. With CBACKUP_TEST_ROUNDS=20 there are so many more of them.
"""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import unittest

from tests.faults import mount_or_skip, unmount
from tests.harness import Case, copy_wrong_bytes, make_tree, read_file, some_bytes, walk, write_file

POINTS = ["moves-between", "digested", "linked:2", "in-place", "counted", "counted:2"]
"""Where a client is killed; the first of them when it does what became of its copies, the second when it copies."""

ROUNDS = int(os.environ.get("CBACKUP_TEST_ROUNDS", "1"))
SIZE = 16 << 20
BLOCK = 1 << 16
NOTHING = bytes(BLOCK)


def read_image(path):
    """[(offset, bytes)] of the blocks of an image that are not zeros, as they were at one instant: it is read until it has not
    changed between two times."""
    before = None
    while True:
        blocks = []
        with open(path, "rb") as file:
            for offset in range(0, SIZE, BLOCK):
                block = file.read(BLOCK)
                if block != NOTHING:
                    blocks.append((offset, block))
        if blocks == before:
            return blocks
        before = blocks


def write_image(path, blocks):
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, block in blocks:
            file.seek(offset)
            file.write(block)


def counted(cluster):
    """{path: digest} of what the server of s calls a copy now."""
    books = sqlite3.connect("file:%s?mode=ro" % os.path.join(cluster.home("s"), "state/books.db"), uri=True, timeout=30)
    try:
        return {os.fsdecode(path): digest.hex() for path, digest in books.execute(
            "SELECT COALESCE(c.path, e.path), e.digest FROM copies c JOIN entries e ON e.id=c.file "
            "WHERE c.state='k' AND e.digest IS NOT NULL")}
    finally:
        books.close()


class PowerTest(Case):
    """A source on s that changes all the time, and one backup, on a disk of its own."""

    @classmethod
    def setUpClass(cls):
        if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
            raise unittest.SkipTest("only root can mount an image, and it needs mkfs.ext4")
        cls.c = cls.share_cluster("s", "a", replicas=1)
        cls.dice = random.Random(1)
        cls.image, cls.disk, cls.serial = cls.c.path("image"), cls.c.path("a", "disk"), 0
        cls.source = cls.c.source("docs", "s", {"d%d/f%d" % (n % 4, n): cls.dice.randrange(20000) for n in range(40)})
        os.mkdir(cls.disk)
        write_image(cls.image, [])
        subprocess.check_call(["mkfs.ext4", "-q", "-F", "-J", "size=1", cls.image], stdout=subprocess.DEVNULL)
        try:
            cls.mount()
        except unittest.SkipTest as reason:
            cls.skip_class(str(reason))
        cls.c.backup("ba", "a", "10M", path=os.path.join(cls.disk, "backup"))
        cls.c.start("s")

    @classmethod
    def mount(cls):
        mount_or_skip(cls, "-o", "loop,noatime", cls.image, cls.disk)

    def change(self):
        """What happens to a source between two passes. Returns the paths that may lie elsewhere, or be others, by now."""
        names = sorted(name for name, path, info in walk(self.source) if os.path.isfile(path))
        some = self.dice.sample(names, 6)
        for name in some[:3]:
            write_file(os.path.join(self.source, name), some_bytes(self.dice.randrange(9000), self.dice.random()))
        os.unlink(os.path.join(self.source, some[3]))
        for name in some[4:]:
            os.rename(os.path.join(self.source, name), os.path.join(self.source, name + "'"))
        PowerTest.serial += 1
        make_tree(self.source, {"new/%d/%d" % (self.serial, n): self.dice.choice([0, 10, 5000, 300000]) for n in range(4)})
        return set(some)

    def assertWhole(self, image, counted, touched):
        """In an image: of each of these copies the bytes, and, but for those `touched`, at its place. Returns how many."""
        place = image + ".mounted"
        os.mkdir(place)
        # With its journal replayed, as after a power failure: for that it must not be read-only.
        subprocess.check_call(["mount", "-o", "loop", image, place])
        try:
            found = {name[len("backup/"):]: hashlib.blake2b(read_file(path), digest_size=32).hexdigest()
                     for name, path, _ in walk(place) if os.path.isfile(path)}
        finally:
            subprocess.check_call(["umount", place])
            os.rmdir(place)
        anywhere = set(found.values())
        lost = [path for path, digest in counted.items() if found.get("docs/" + path) != digest
                and not (path in touched and digest in anywhere)]
        self.assertEqual([], lost, "%d of %d copies are not whole" % (len(lost), len(counted)))
        return len(counted)

    def settle(self):
        self.c.settle("a")
        self.assertEqual([], copy_wrong_bytes(self.c, "docs", 1))

    def test_whenever_it_fails_all_that_is_counted_is_whole_and_the_next_passes_go_on_from_there(self):
        self.settle()
        whole, points = 0, self.todays(POINTS * ROUNDS, 3 * ROUNDS)
        for turn, point in enumerate(points):
            touched = self.change()
            self.assertRc(-signal.SIGKILL, self.c.client("a", CBACKUP_TEST_KILL=point))
            books, blocks = counted(self.c), read_image(self.image)
            write_image(self.image + ".failed", blocks)
            whole += self.assertWhole(self.image + ".failed", books, touched)
            if turn % 3 == 2:       # and now it really does
                write_image(self.image + ".failed", blocks)
                unmount(self.disk)
                os.rename(self.image + ".failed", self.image)
                self.mount()
                self.settle()
            else:
                self.assertRc(0, self.c.client("a"))
        self.settle()
        self.assertGreaterEqual(whole, 25 * len(points))

    def test_in_the_middle_of_passes_all_that_is_counted_is_whole(self):
        instants = []
        for _ in range(2 * ROUNDS):
            touched = self.change()
            client = self.c.spawn("a", "client")
            while not client.ends_within(0.01):
                instants.append((counted(self.c), read_image(self.image), touched))
            self.assertRc(0, client.wait())
        images = {}
        for books, blocks, touched in instants[::max(1, len(instants) // (12 * ROUNDS))]:
            write_image(self.image + ".instant", blocks)
            images[len(images)] = self.assertWhole(self.image + ".instant", books, touched)
        self.assertGreaterEqual(len(images), 3 * ROUNDS)
        self.settle()


if __name__ == "__main__":
    unittest.main()
