"""What comes back is the same in everything that a file system knows of it, whatever the backups could keep."""

import collections
import functools
import os
import stat
import subprocess
import unittest

from tests.disks import DiskCase, row
from tests.harness import DIRECTORY, Case, Link, digest_of, make_tree, some_bytes, walk

ROOT = os.geteuid() == 0
Facts = collections.namedtuple("Facts", "kind mode mtime_ns uid gid size digest target twins")


def account(root):
    """{relative path: Facts} of a tree and of its root (""): by lstat of everything, without the help of the program.
    twins: the paths that are the same file."""
    found = [("", root, os.lstat(root))] + list(walk(root))
    twins = collections.defaultdict(set)
    for relative, _, info in found:
        if stat.S_ISREG(info.st_mode):
            twins[info.st_ino].add(relative)
    result = {}
    for relative, path, info in found:
        regular, link = stat.S_ISREG(info.st_mode), stat.S_ISLNK(info.st_mode)
        result[relative] = Facts(
            stat.S_IFMT(info.st_mode), None if link else stat.S_IMODE(info.st_mode), info.st_mtime_ns, info.st_uid, info.st_gid,
            info.st_size if regular else None, digest_of(path) if regular else None, os.readlink(path) if link else None,
            frozenset(twins[info.st_ino]) if regular else None)
    return result


def blocks_of(path):
    return os.lstat(path).st_blocks * 512


class ExactCase(Case):

    def assertSameAccount(self, expected, actual):
        self.assertEqual(set(expected), set(actual))
        lines = ["%r: %s is %r instead of %r" % (name, field, getattr(actual[name], field), getattr(expected[name], field))
                 for name in sorted(expected) for field in Facts._fields
                 if getattr(actual[name], field) != getattr(expected[name], field)]
        if lines:
            self.fail("\n  ".join(["not the same:"] + lines[:20]))


class EverythingComesBackTest(ExactCase):
    """Modes, owners, times in ns, links and holes of files, directories, symlinks and the source's root."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        cls.source = source = cls.c.source("docs", "s", {
            "plain": b"1", "d/inner/f": b"2", "d/inner/g": b"3", "void": DIRECTORY, "deep/void/void": DIRECTORY,
            "twin 1": b"twin",
            "lone": b"twin", "closed/f": b"4", "link": Link("plain"), "dangling": Link("no/where"), "d/up": Link("../plain"),
            "empty": b"", b"odd \xff\n*": b"5", "big": some_bytes(100000, 1)})
        os.mkdir(os.path.join(source, "other"))
        for name in ("other/twin 2", "d/inner/twin 3", "zz twin"):
            os.link(os.path.join(source, "twin 1"), os.path.join(source, name))
        os.link(os.path.join(source, "empty"), os.path.join(source, "empty too"))
        with open(os.path.join(source, "sparse"), "wb") as file:
            file.write(b"at the start")
            file.seek(4 << 20)
            file.write(b"in the middle")
            file.truncate(8 << 20)
        modes = {"plain": 0o4755, "d/inner/f": 0o444, "d/inner/g": 0o2710, "twin 1": 0o640, "closed/f": 0o400, "big": 0o604,
                 "d/inner": 0o2775, "closed": 0o500, "void": 0o1777, "deep": 0o711, "": 0o751}
        if ROOT:
            modes.update({"empty": 0, "deep/void": 0o111})      # nobody but root can read them
            owners = {"plain": (1234567, 7654321), "d/inner/f": (1, 1), "d": (54321, 0), "link": (1, 2), "void": (2, 3),
                      "twin 1": (77, 88), "": (3, 4), "dangling": (0, 99999)}
            for name, (uid, gid) in owners.items():
                os.chown(os.path.join(source, name), uid, gid, follow_symlinks=False)
        for name, mode in modes.items():
            os.chmod(os.path.join(source, name), mode)
        for number, name in enumerate(("plain", "link", "dangling", "void", "deep/void", "twin 1", "sparse", "closed",
                                       "d/inner", "d", "")):
            os.utime(os.path.join(source, name), ns=(1, 10 ** 18 + 123456789 * number + 1), follow_symlinks=False)
        for host in "ab":
            cls.c.backup("b" + host, host, "200M")
        cls.c.start()
        cls.c.passes("ab")
        cls.account = account(source)
        cls.c.kill("s")

    @classmethod
    @functools.lru_cache(None)
    def first(cls):
        """(Result, where, account, blocks of a sparse file) of a restore of everything, made once for the class."""
        to = cls.c.path("first")
        result = cls.c.restore("a", "docs", to=to)
        return result, to, account(to), blocks_of(os.path.join(to, "sparse"))

    def restored(self, *paths, **more):
        to = os.path.join(self.directory(), "to")
        result = self.c.restore("a", "docs", *paths, to=to, **more)
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)
        return to

    def test_an_independent_walk_finds_no_difference(self):
        result, _, found, blocks = self.first()
        self.assertEqual((0, ""), (result.rc, result.stderr))
        self.assertSameAccount(self.account, found)
        self.assertLess(blocks, 4 << 20, "a sparse file is no longer sparse")

    def test_nor_after_a_restore_from_disks(self):
        to = self.restored(options=["--from", self.c.backups["ba"].path, "--from", self.c.backups["bb"].path])
        self.assertSameAccount(self.account, account(to))
        self.assertLess(blocks_of(os.path.join(to, "sparse")), 4 << 20, "a sparse file is no longer sparse")

    def test_nor_after_a_second_restore_over_what_had_been_changed(self):
        to = self.first()[1]
        for name in ("plain", "void", "closed", "d/inner", "twin 1", "big"):
            os.chmod(os.path.join(to, name), 0o700)
            os.utime(os.path.join(to, name), ns=(5, 5))
        os.utime(os.path.join(to, "link"), ns=(5, 5), follow_symlinks=False)
        os.unlink(os.path.join(to, "zz twin"))
        os.unlink(os.path.join(to, "other/twin 2"))
        os.rmdir(os.path.join(to, "deep/void/void"))
        self.assertRc(0, self.c.restore("a", "docs", to=to))
        self.assertSameAccount(self.account, account(to))

    def test_a_part_of_a_link_group_is_linked_among_itself(self):
        for paths in self.todays((["zz twin"], ["other", "zz twin"], ["d/inner/twin 3", "twin 1"], ["*twin*"]), 2):
            with self.subTest(paths=paths):
                to = self.restored(*paths)
                found = {name: facts for name, facts in account(to).items() if facts.size is not None and "twin" in name}
                self.assertEqual({frozenset(found)}, {facts.twins for facts in found.values()})
                for name, facts in found.items():
                    self.assertEqual(self.account[name]._replace(twins=None), facts._replace(twins=None))

    @unittest.skipUnless(ROOT, "only root can give files away")
    def test_owners_and_modes_that_a_backup_could_not_keep_come_from_the_catalog(self):
        # As in a backup of an ordinary user, or on a file system that knows no owners.
        for backup in ("ba", "bb"):
            path = self.c.backups[backup].path
            subprocess.run(["chown", "-hR", "65534:65534", os.path.join(path, "docs")], check=True)
            subprocess.run(["chmod", "-R", "u=rwX,go=", os.path.join(path, "docs")], check=True)
        self.assertSameAccount(self.account, account(self.restored()))


class OwnersTest(DiskCase, ExactCase):
    """Owners by name where this machine knows the name, else by number; an ordinary user gets what he can, and is told."""

    @unittest.skipUnless(ROOT, "only root can give files away")
    def test_by_name_and_then_by_number(self):
        import grp
        import pwd
        user = next(one for one in pwd.getpwall() if one.pw_uid not in (0, 54321))
        group = next(one for one in grp.getgrall() if one.gr_gid not in (0, 54321))
        known = {"user": user.pw_name, "group": group.gr_name, "uid": 54321, "gid": 54321}
        unknown = {"user": "no such user", "group": "no such group", "uid": 54321, "gid": 12345}
        disk = self.disk([row("", "d", **known), row("known", content="1", **known), row("unknown", content="2", **unknown),
                          row("link", "l", "x", **known), row("dir", "d", **unknown)], {"known": "1", "unknown": "2"})
        self.restored(disk)
        owners = {name: (facts.uid, facts.gid) for name, facts in account(self.to).items()}
        by_name = (user.pw_uid, group.gr_gid)
        self.assertEqual({"": by_name, "known": by_name, "link": by_name, "unknown": (54321, 12345), "dir": (54321, 12345)},
                         owners)

    @unittest.skipUnless(ROOT, "only root can become another user")
    def test_an_ordinary_user_gets_everything_but_the_owners(self):
        disk = self.disk([row("", "d"), row("f", content="1", uid=1), row("d", "d", uid=1, mode=0o555),
                          row("d/g", content="2", uid=2),
                          row("d/lost", content="3"), row("l", "l", "f", uid=1)], {"f": "1", "d/g": "2"})
        os.chmod(self.base, 0o755)
        os.chown(os.path.dirname(self.to), 65534, 65534)
        first = self.restored(disk, rc=1, user=65534)
        self.assertEqual(1, len(first.error_lines), "one line for the file that is missing: %s" % first)
        # The read-only directory is there already; what was missing goes into it nevertheless.
        make_tree(os.path.join(disk, "docs"), {"d/lost": "3"})
        self.restored(disk, user=65534)
        found = account(self.to)
        self.assertEqual({"", "f", "d", "d/g", "d/lost", "l"}, set(found))
        self.assertEqual({65534}, {facts.uid for facts in found.values()})
        self.assertEqual(0o555, found["d"].mode)

    @unittest.skipUnless(ROOT, "only root can become another user")
    def test_what_an_ordinary_user_cannot_set_is_reported_once(self):
        names = ["f%02d" % number for number in range(20)]
        disk = self.disk([row(name, content=name, mode=0o640) for name in names] + [row("new", content="new")],
                         dict({name: name for name in names}, new="new"))
        os.chmod(self.base, 0o755)
        make_tree(self.to, {name: name for name in names})      # the right bytes, but they belong to root
        os.chown(self.to, 65534, 65534)
        result = self.restored(disk, user=65534)
        self.assertOneError(result, "20")
        self.assertIn("new", self.back())


if __name__ == "__main__":
    unittest.main()
