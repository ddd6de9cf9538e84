"""Homes and backups that an earlier version has made: they are taken over, and nothing is copied again.

`data/layout1.tar.gz` has the books of a source, the source and a backup as version 1.0 with layout 1 left them, while the
backup had not yet heard of two changes: a renamed file, and one of which nothing but the ctime is another.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
import unittest

import cbackup
from tests.harness import Cluster, TOP, copy_wrong_bytes, make_tree, read_file, wait_for, write_file

LAYOUT_1 = os.path.join(TOP, "tests", "data", "layout1.tar.gz")


def take_over(cluster, archive):
    """Lays out an archive in a cluster with the hosts s and a, the source docs and the backup ba: of its key."""
    source = cluster.source("docs", "s")
    backup = cluster.backup("ba", "a", size="1G")
    for path in (source, backup):
        shutil.rmtree(path)
    with tarfile.open(archive) as tar:
        tar.extractall(cluster.base)
    identity = os.path.join(backup, ".cbackup", "identity")
    words = json.loads(read_file(identity).decode())
    words["cluster"] = cbackup.Home(cluster.home("a")).cluster_id()
    write_file(identity, json.dumps(words))
    return source, backup


def rows_of(path, sql):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def layout_of(path):
    return rows_of(path, "PRAGMA user_version")[0][0]


class Layout1Test(unittest.TestCase):

    def test_books_and_a_backup_of_the_version_before_go_on_without_copying(self):
        with Cluster("s", "a", replicas=1) as c:
            source, backup = take_over(c, LAYOUT_1)
            books = os.path.join(c.home("s"), "state", "books.db")
            database = os.path.join(backup, ".cbackup", "backup.db")
            self.assertEqual([layout_of(books), layout_of(database)], [1, 1])
            c.start()
            first = c.client("a")
            self.assertEqual(first.rc, 0, first)
            self.assertEqual((first.json["copied_files"], first.json["wire_bytes"]), (0, 0), first)
            c.settle()
            wait_for(lambda: c.status()["sources"]["docs"]["unproven_files"] == 0, 20, "not read")
            self.assertEqual(copy_wrong_bytes(c, "docs", 1), [])
            self.assertEqual([layout_of(books), layout_of(database)],
                             [cbackup.BOOKS_SCHEMA_VERSION, cbackup.VAULT_SCHEMA_VERSION])
            self.assertEqual(c.run("a", "status", "--check").rc, 0)
            self.assertEqual(c.run("a", "verify").rc, 0)
            make_tree(source, {"later": b"x" * 1000})       # what triggers added up then is added up once
            self.assertEqual(1, c.client("a").json["copied_files"])
            for path, sums, sum_of in ((books, "groups", "entries WHERE kind='f'"), (database, "sums", "held")):
                self.assertEqual(*(rows_of(path, "SELECT SUM(%s), SUM(%s) FROM %s" % (files, size, table)) for files, size, table in
                                   (("files", "bytes", sums), ("1", "size", sum_of))))
            self.assertEqual([(0,)], rows_of(database, "SELECT bytes FROM used WHERE what='coming'"))

    def test_old_versions_of_the_version_before_can_be_restored(self):
        with Cluster("s", "a", replicas=1) as c:
            source, backup = take_over(c, LAYOUT_1)
            when = min(int(name.split("-")[2].split(".")[0])
                       for name in os.listdir(os.path.join(backup, ".cbackup", "catalog", "docs")))
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
            c.start()
            result = c.restore("a", "docs", to=c.path("then"), options=["--at", at])
            self.assertEqual(result.rc, 0, result)
            self.assertEqual(read_file(c.path("then", "small")), b"small one")
            self.assertEqual(read_file(c.path("then", "d", "deleted")), b"gone")


class Layout2Test(unittest.TestCase):
    """Books of layout 2 had in a file's group only those backups that counted, and whether one was leaving."""

    CONFIG = ("[cluster]\nname = t\nreplicas = 1\n[hosts]\ns = x\na = x\nb = x\n[sources]\ndocs = s:%s\n"
              "[backups]\nba = a:/ba size=1G\nbb = b:/bb size=1G leaving\n")

    def test_what_each_file_has_is_counted_anew(self):
        with tempfile.TemporaryDirectory() as base:
            make_tree(os.path.join(base, "docs"), {"f%d" % number: b"1" for number in range(3)})
            config = cbackup.parse_config(self.CONFIG % os.path.join(base, "docs"))
            path = os.path.join(base, "books.db")
            books = cbackup.Books(path, "s")
            books.configure(config)
            cbackup.run_scan(books, config.sources["docs"])
            row = books.source_row("docs")
            facts = books.versions_of(row["id"], [b"f0", b"f1", b"f2"])
            for backup in (books.hear("ba", {}), books.hear("bb", {})):
                books.record_check(backup, row, [(one["id"], one["version"], b"d" * 32) for one in facts.values()])
                books.count_copies(backup, row["id"], [(name, one["version"], 1) for name, one in facts.items()])
            counted = books.figures(row)["copies"], books.duties()
            with books.write() as db:       # as layout 2 had it while ba was lost
                db.execute("UPDATE backups SET lost=1 WHERE name='ba'")
                db.execute("UPDATE groups SET key='2~', n=0, k=1 WHERE files>0")
                db.execute("DROP INDEX entries_grp")
                db.execute("ALTER TABLE entries ADD COLUMN rnd INTEGER")
                db.execute("CREATE INDEX entries_rnd ON entries(grp, rnd) WHERE grp IS NOT NULL")
                db.execute("PRAGMA user_version=2")
            books.close()
            books = cbackup.Books(path, "s")
            self.addCleanup(books.close)
            self.assertEqual(cbackup.BOOKS_SCHEMA_VERSION, layout_of(path))
            self.assertEqual({"bb": 3}, books.duties())
            books.hear("ba", {})
            self.assertEqual(counted, (books.figures(row)["copies"], books.duties()))
            self.assertEqual(({"2": 3}, {"bb": 0}), counted)
            make_tree(os.path.join(base, "docs"), {"new": b"1"})
            cbackup.run_scan(books, config.sources["docs"])
            self.assertEqual([b"new"], [wanted[0] for wanted in books.claim(books.hear("ba", {}), row, 1 << 30, 9, 1 << 30)])


if __name__ == "__main__":
    unittest.main()
