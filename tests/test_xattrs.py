"""Extended attributes, which ACLs are on Linux: in the catalogs when a source's line says `xattrs`."""

import contextlib
import errno
import functools
import gzip
import io
import json
import os
import sqlite3
import struct
import tempfile
import unittest
from unittest import mock

import cbackup
from tests.disks import DiskCase, catalog_bytes, row
from tests.harness import (
    DIRECTORY, Case, Link, differences, inodes, make_tree, read_file, tree, wait_for, write_file)

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(user):
    """What `setfacl -m u:USER:rw` makes of mode 640, as the kernel has it."""
    nobody = 0xffffffff
    entries = ((1, 6, nobody), (2, 6, user), (4, 4, nobody), (16, 6, nobody), (32, 0, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def takes_attributes(directory):
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            os.setxattr(file.name, "user.a", b"1")
            os.setxattr(file.name, ACCESS, acl(1000))
        return True
    except (OSError, AttributeError):
        return False


def attributes(path):
    """{name: value} of one path itself; not what a security module says."""
    return {name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if name.startswith(("user.", "system.posix_acl", "trusted.", "security.capability"))}


def all_attributes(top):
    return {path: attributes(os.path.join(top, path) if path else top)
            for path in [""] + sorted(tree(top))}


PLACE = next(filter(takes_attributes, [tempfile.gettempdir(), "/var/tmp"]), None)   # in memory only since Linux 6.6
needs_attributes = unittest.skipUnless(PLACE, "needs extended attributes where temporary files are")


def setUpModule():
    patch = mock.patch.object(tempfile, "tempdir", PLACE or tempfile.tempdir)
    patch.start()
    unittest.addModuleCleanup(patch.stop)


@needs_attributes
class RoundTripTest(Case):

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1, scan_min="0s")
        cls.files = {"f": b"text", "shared": b"more", "d/e/g": b"deep", "plain": b"nothing",
                     "read-only": b"r", "l": Link("f"), "void": DIRECTORY}
        cls.docs = c.source("docs", "s", cls.files, xattrs=True)
        cls.other = c.source("other", "s", {"o": b"other"})
        c.backup("ba", "a", "100M")
        top = cls.docs
        os.setxattr(top, "user.root", b"top")
        os.setxattr(top + "/f", "user.one", b"\0\xff\n")
        os.setxattr(top + "/f", "user.gr\u00fcn", b"")
        os.setxattr(top + "/f", b"user.\xff", b"odd")
        os.setxattr(top + "/shared", ACCESS, acl(1234))
        os.setxattr(top + "/d", DEFAULT, acl(1234))
        os.setxattr(top + "/d/e", "user.long", b"x" * 3000)
        os.setxattr(top + "/read-only", "user.a", b"1")
        os.chmod(top + "/read-only", 0o444)
        os.setxattr(cls.other + "/o", "user.a", b"1")
        if os.geteuid() == 0:
            os.setxattr(top + "/l", "trusted.link", b"1", follow_symlinks=False)
        c.start()
        c.round()

    def brought_back(self, source="docs", to=None):
        to = to or self.c.path("to %d" % len(os.listdir(self.c.base)))
        self.assertRc(0, self.c.restore("a", source, to=to))
        return to

    @classmethod
    @functools.lru_cache(None)
    def first(cls):
        """(Result, where, how it differs from the source, its attributes, the source's) of a restore, made once for the class."""
        to = cls.c.path("first")
        result = cls.c.restore("a", "docs", to=to)
        return result, to, differences(tree(cls.docs), tree(to)), all_attributes(to), all_attributes(cls.docs)

    def test_everything_comes_back_as_it_was(self):
        result, _, lines, found, expected = self.first()
        self.assertRc(0, result)
        self.assertEqual(expected, found)
        self.assertEqual([], lines)
        self.assertEqual("", result.stderr)
        self.assertEqual(b"\0\xff\n", found["f"]["user.one"])

    def test_a_source_whose_line_does_not_ask_has_none(self):
        self.assertEqual({}, attributes(self.brought_back("other") + "/o"))

    def test_what_is_in_place_gets_them_and_loses_those_that_are_not_wanted(self):
        to = self.first()[1]
        os.removexattr(to + "/f", "user.one")
        os.setxattr(to + "/plain", ACCESS, acl(77))
        os.setxattr(to + "/d/e", "user.long", b"another")
        self.brought_back(to=to)
        self.assertEqual(all_attributes(self.docs), all_attributes(to))
        self.assertEqual([], differences(tree(self.docs), tree(to)))

    def test_copies_and_directories_in_a_backup_have_none(self):
        found = all_attributes(os.path.join(self.c.backups["ba"].path, "docs"))
        self.assertEqual({}, {path: one for path, one in found.items() if one})

    def test_a_change_of_attributes_alone_is_seen_and_copies_nothing(self):
        self.c.round()
        before = inodes(self.c.kept_as("ba", "docs"))
        os.setxattr(self.docs + "/plain", "user.later", b"1")
        os.removexattr(self.docs + "/d", DEFAULT)
        result = self.c.client("a")
        self.assertRc(0, result)
        self.assertEqual([0, 0, 0], [result.json[key] for key in (
            "copied_files", "updated_files", "wire_bytes")])
        self.assertEqual(before, inodes(self.c.kept_as("ba", "docs")))
        to = self.brought_back()
        self.assertEqual(b"1", os.getxattr(to + "/plain", "user.later"))
        self.assertEqual(all_attributes(self.docs), all_attributes(to))

    def test_a_line_that_asks_later_and_then_no_more(self):
        for asked in (True, False):
            self.c.sources["other"] = self.c.sources["other"]._replace(
                options={"xattrs": True} if asked else {})
            self.c.write_config()
            self.c.settle()
            to = self.brought_back("other")
            self.assertEqual({"user.a": b"1"} if asked else {}, attributes(to + "/o"))

    def test_catalogs_that_the_version_before_fetched_are_fetched_again(self):
        self.c.round()
        directory = os.path.join(self.c.backups["ba"].path, ".cbackup")
        for name in os.listdir(os.path.join(directory, "catalog", "docs")):
            path = os.path.join(directory, "catalog", "docs", name)
            with gzip.open(path) as stream:
                lines = [line for line in stream if not line.startswith(b'{"xattrs')]
            write_file(path, gzip.compress(b"".join(lines)))
        with contextlib.closing(sqlite3.connect(os.path.join(directory, "backup.db"))) as db, db:
            self.assertEqual(1, db.execute("DELETE FROM meta WHERE key='catalog-level:docs'").rowcount)
        to = self.brought_back()
        self.assertNotEqual(all_attributes(self.docs), all_attributes(to))
        self.c.round()
        self.assertEqual(all_attributes(self.docs), all_attributes(self.brought_back(to=to)))

    def test_the_version_before_reads_the_catalogs_in_a_backup(self):
        directory = os.path.join(self.c.backups["ba"].path, ".cbackup", "catalog", "docs")
        for name in os.listdir(directory):
            count, ended = 0, False
            with gzip.open(os.path.join(directory, name)) as stream:
                for line in stream:
                    value = json.loads(line)
                    if isinstance(value, dict):
                        ended = value.get("end") == count
                    else:
                        count += 1
                        self.assertIn(len(value), (1, 12))
            self.assertTrue(ended)


@needs_attributes
class ScanTest(Case):
    """What the scanner makes of them, in this process."""

    def setUp(self):
        base = self.directory()
        self.top = os.path.join(base, "docs")
        make_tree(self.top, {"f": b"1", "g": b"2"})
        self.config = cbackup.parse_config("[cluster]\nname = t\n[sources]\ndocs = s:%s xattrs\n" % self.top)
        self.books = cbackup.Books(os.path.join(base, "books.db"), "s")
        self.addCleanup(self.books.close)
        self.books.configure(self.config)

    def look(self):
        """A look at the source; returns what it calls a problem."""
        with contextlib.closing(cbackup.Scan(self.books, self.config.sources["docs"])) as scan:
            scan.run()
        return scan.problems

    def known(self, path=b"f"):
        return self.books.one("SELECT xattrs FROM entries WHERE path=?", path)[0]

    def test_what_is_too_much_is_named_by_every_look_and_the_rest_is_kept(self):
        os.setxattr(self.top + "/f", "user.a", b"small")
        os.setxattr(self.top + "/f", "user.b", b"x" * 30)
        with mock.patch.object(cbackup, "XATTRS_LIMIT", 20):
            for _ in range(3):
                (problem,) = self.look()
                self.assertRegex(problem, "^f: extended attributes .* more than 20 bytes together: user.b$")
                self.age()
            self.assertEqual({"user.a": "c21hbGw=", "user.b": None}, json.loads(self.known()))

    def age(self):
        """Time goes by for what was changed just now."""
        wait_for(lambda: not any(cbackup.is_fresh(os.stat(os.path.join(self.top, name)))
                                 for name in os.listdir(self.top)), 5, "files are still as good as new")

    def test_what_was_changed_just_now_is_looked_at_once_more(self):
        with mock.patch.object(cbackup, "FINE_CLOCK", 60):      # on a busy machine it takes a while to come here
            self.look()
        self.assertEqual(" {}", self.known())
        os.setxattr(self.top + "/f", "user.a", b"1")
        with self.books.write() as db:  # as if the clock had not gone on in between
            db.execute("UPDATE entries SET ctime=? WHERE path=?",
                       (os.stat(self.top + "/f").st_ctime_ns, b"f"))
        self.age()
        self.look()
        self.assertEqual('{"user.a":"MQ=="}', self.known())
        with mock.patch.object(cbackup, "list_xattrs", side_effect=AssertionError("no change")):
            self.look()

    def test_a_key_that_is_almost_this_one_is_an_error_that_names_it(self):
        with self.assertRaisesRegex(cbackup.ConfigError, "'xattr' is not one of .* exclude_caches, xattrs"):
            cbackup.parse_config(self.config.text.replace("xattrs", "xattr"))

    def test_a_system_where_they_cannot_be_read_is_named(self):
        with without_calls():
            self.assertEqual(1, len(self.look()))
            self.assertRegex(self.look()[0], "xattrs.*cannot read")
        self.assertEqual([], self.look())

    def test_pages_of_the_catalog_stay_short_and_complete(self):
        for number in range(20):
            write_file(os.path.join(self.top, "many %d" % number), b"")
            os.setxattr(os.path.join(self.top, "many %d" % number), "user.a", b"x" * 500)
        self.look()
        row = self.books.source_row("docs")
        upto, cursor, found = self.books.close_generation(row), (0, 0), []
        with mock.patch.object(cbackup, "XATTRS_PAGE", 2000):
            more = True
            while more:
                page, more = self.books.catalog_entries(row["id"], 0, upto, cursor)
                self.assertLessEqual(sum(len(json.dumps(one[14])) for one in page), 2000)
                found += [one[2] for one in page]
                cursor = page[-1][:2]
        self.assertEqual(sorted(os.listdir(os.fsencode(self.top)) + [b""]), sorted(found))

    def test_what_a_peer_of_level_1_gets(self):
        row = cbackup.CatalogRow(b"f", "f", proven=False, xattrs={"user.a": "MQ=="})
        self.assertEqual([12, 13], [len(row.to_wire(level)) for level in (1, 2)])
        self.assertEqual(row, cbackup.CatalogRow.from_json(json.loads(json.dumps(row.to_wire(2)))))


@contextlib.contextmanager
def without_calls():
    """Python as it is on macOS and the BSDs."""
    kept = {name: os.__dict__[name] for name in ("listxattr", "getxattr", "setxattr", "removexattr")
            if name in os.__dict__}
    for name in kept:
        delattr(os, name)
    try:
        yield
    finally:
        os.__dict__.update(kept)


class RestoreTest(DiskCase):
    """From the catalog to the target, whatever both are."""

    def docs(self, attributes, path="f"):
        """A disk of which a catalog says that a file has these attributes."""
        lines = catalog_bytes([row("", "d"), {"xattrs": attributes}, row(path, content="text")], end=2)
        return self.disk([], {path: b"text"}, packed=gzip.compress(lines))

    def in_this_process(self, disk):
        """Restores; returns what was said on standard error."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(0, cbackup.main(self.words([disk])))
        self.assertEqual(b"text", read_file(os.path.join(self.to, "f")))
        return said.getvalue()

    def test_a_target_that_takes_none_is_named_once(self):
        refused = OSError(errno.ENOTSUP, "Operation not supported")
        with mock.patch.object(os, "setxattr", side_effect=refused, create=True):
            said = self.in_this_process(self.docs({"user.a": "MQ==", "user.b": "MQ==", ACCESS: "MQ=="}))
        lines = ["cbackup: extended attributes (%s) could not be set (Operation not supported), "
                 "%d times" % each for each in (("ACLs", 1), ("user.", 2))]
        self.assertEqual(lines, sorted(said.splitlines()))

    def test_a_system_that_cannot_set_them_is_named(self):
        with without_calls():
            said = self.in_this_process(self.docs({"user.a": "MQ=="}))
        self.assertIn("could not be set (Python cannot on this system), 1 times", said)

    @unittest.skipIf(os.geteuid() == 0, "needs an ordinary user")
    def test_what_only_root_may_set_is_left_to_root(self):
        said = self.in_this_process(self.docs({
            "security.capability": "AQAAAgAgAAAAAAAAAAAAAAAAAAA=", "trusted.a": "MQ=="}))
        self.assertIn("only root may set (security., trusted.), 1 times", said)

    def test_attributes_that_cannot_be_a_files_are_a_damaged_catalog(self):
        for wrong in ({"user.a": 1}, {"user.a": "no base64"}, {"": "MQ=="}, {"user.\0": "MQ=="}, {"x" * 256: "MQ=="}, [], "x",
                      {"user.\ud800": "MQ=="}, {"user.a": "A" * 200000}):
            with self.subTest(wrong=str(wrong)[:40]):
                result = self.restored(self.docs(wrong), rc=1)
                self.assertRegex(result.stderr, "wrong attributes|not valid text")


if __name__ == "__main__":
    unittest.main()
