"""Databases that rot, get lost, or grow: what can be made again is made again, and nothing is copied for it."""

import collections
import contextlib
import os
import random
import shutil
import sqlite3
import threading
import unittest
import unittest.mock

import cbackup
from tests.harness import Case, inodes, make_tree, wait_for, write_file

PAGE = 4096
KINDS = {"noise": lambda page: random.Random(page).getrandbits(8 * PAGE).to_bytes(PAGE, "little"),
         "zeros": lambda page: bytes(PAGE), "text": lambda page: b"garbage " * (PAGE // 8)}


def with_page(path, whole, page, content):
    """Writes the database `whole` (bytes) to `path`, with another content of one page."""
    write_file(path, whole[:page * PAGE] + content + whole[(page + 1) * PAGE:])


class GarbageTest(Case):
    """Whatever page of a database is hit while nobody has it open: it is set aside, or what is read of it is right."""

    def setUp(self):
        self.base = self.directory()
        self.path = os.path.join(self.base, "state", "books.db")
        self.docs = os.path.join(self.base, "docs")
        make_tree(self.docs, {"d%d/a file with a longer name %03d" % (n % 7, n): n for n in range(40)})
        self.config = cbackup.parse_config("[hosts]\ns = 1.1.1.1\na = 1.1.1.2\n[sources]\ndocs = s:%s\n[backups]\n"
                                           "b1 = a:%s size=9M\n" % (self.docs, os.path.join(self.base, "b1")))
        handler = unittest.mock.patch("cbackup.log")
        handler.start()
        self.addCleanup(handler.stop)

    @contextlib.contextmanager
    def service(self):
        service = cbackup.Service(cbackup.Home(self.base), self.config, "s")
        try:
            yield service
        finally:
            service.books.close()

    def forget(self, folder):
        for name in os.listdir(folder):
            if ".db" in name:
                os.unlink(os.path.join(folder, name))

    def use_books(self, service):
        """What a server does with them: a scan, and a backup's requests."""
        def ask(op, **fields):
            return service.handle(dict(fields, op=op, backup="b1"))
        service.scan("docs")
        ask("begin", identity="ab", adopt=False, capacity=1 << 30, free=1 << 30, used=0, files=0, sums={})
        rows = ask("claim", source="docs", free=1 << 30, most_files=1000, most_bytes=1 << 30)["rows"]
        ask("todo", source="docs", kind=2, after=0)
        ask("release", source="docs", paths=[], all=True)
        service.handle({"op": "status"})
        return len(rows)

    def use_damaged_books(self, service):
        """The same; what shows only now is set aside as the server's own loops do it."""
        try:
            found = self.use_books(service)
        except sqlite3.DatabaseError as error:
            self.assertTrue(cbackup.is_damage(error), error)
            service.books.start_again(self.config, str(error))
            found = self.use_books(service)
        self.assertEqual(40, found)

    def test_books_that_cannot_be_made_again_now_are_made_when_their_disk_works(self):
        with self.service() as service:
            self.use_books(service)
            with unittest.mock.patch("cbackup.open_database", side_effect=sqlite3.OperationalError("disk I/O error")):
                service.mend_books(sqlite3.DatabaseError("database disk image is malformed"))
            with self.assertRaises(sqlite3.ProgrammingError):
                service.books.active_sources()
            scanner = cbackup.Scanner(service)
            scanner.start()
            wait_for(lambda: not service.books.gone, 20, "there are no books")
            self.assertEqual([], scanner.look(0.0, 20))
            scanner.stop()
            scanner.join()
            self.assertEqual(40, self.use_books(service))
            self.assertEqual(1, sum("damaged" in name for name in os.listdir(os.path.dirname(self.path))))

    def test_every_page_of_the_servers_books(self):
        with self.service() as service:
            self.assertEqual(40, self.use_books(service))
        with open(self.path, "rb") as file:
            whole = file.read()
        aside, kinds, pages = 0, list(KINDS.values()), range(len(whole) // PAGE)
        pages = self.todays(pages, len(pages) // 2)
        for checked in (0, cbackup.CHECKED_BELOW):      # without the check of all pages, as for large ones, and with it
            for page in pages:
                with self.subTest(page=page, checked=checked), unittest.mock.patch("cbackup.CHECKED_BELOW", checked):
                    self.forget(os.path.dirname(self.path))
                    with_page(self.path, whole, page, kinds[page % 3](page))
                    with self.service() as service:
                        self.use_damaged_books(service)
                    aside += checked > 0 and any("damaged" in name for name in os.listdir(os.path.dirname(self.path)))
        self.assertEqual(len(pages), aside, "some page was not noticed where all are checked")

    def test_every_page_of_a_backups_database(self):
        spec = self.config.backups["b1"]
        vault = cbackup.Vault(spec, "c")
        for n in range(100):
            vault.hold("docs", b"path/of/a/file/%03d" % n, n, n, bytes(32), n)
        vault.close()
        path = os.path.join(spec.path, ".cbackup", "backup.db")
        with open(path, "rb") as file:
            whole = file.read()
        for page in range(len(whole) // PAGE):
            with self.subTest(page=page):
                self.forget(os.path.dirname(path))
                with_page(path, whole, page, list(KINDS.values())[page % 3](page))
                vault = cbackup.Vault(spec, "c")
                self.assertIn(len(vault.held_page("docs", b"")), (0, 100))
                vault.close()
                self.assertTrue(any("damaged" in name for name in os.listdir(os.path.dirname(path))))

    def test_a_database_of_a_newer_program_is_not_set_aside(self):
        with self.service():
            pass
        db = sqlite3.connect(self.path)
        db.execute("PRAGMA user_version=%d" % (cbackup.BOOKS_SCHEMA_VERSION + 1))
        db.close()
        with self.assertRaisesRegex(cbackup.CBackupError, "another version"):
            cbackup.Service(cbackup.Home(self.base), self.config, "s")
        self.assertEqual([], [name for name in os.listdir(os.path.dirname(self.path)) if "damaged" in name])


class GarbageFromOutsideTest(Case):
    """The same, with processes: after a clean stop some pages rot; server and client start, and nothing is copied again."""

    def test_books_and_backup_database_full_of_garbage(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f%03d" % n: 100 for n in range(50)})
        kept = c.backup("b1", "a", "9M")
        c.start()
        c.settle()
        before = c.kept_inodes("b1")
        databases = {"s": os.path.join(c.home("s"), "state", "books.db"), "a": os.path.join(kept, ".cbackup", "backup.db")}
        for part, host in self.todays([(part, host) for part in (0, 1, 2, 3) for host in databases], 4):
            path = databases[host]
            pages = os.path.getsize(path) // PAGE
            page = (0, 1, pages // 2, pages - 1)[part]
            c.stop(host)
            with open(path, "r+b") as file:
                file.seek(page * PAGE)
                file.write(KINDS["noise"](page))
            c.start(host)
            result = c.client("a")
            self.assertEqual(0, result.json["copied_files"] + result.json["updated_files"], str(result))
            c.settle()
            self.assertEqual(before, c.kept_inodes("b1"))
        self.assertCopies(c, "docs", 1)


class CoarseTimesTest(Case):
    """backup.db is lost on a disk that keeps no exact times: copies are recognised, nothing is fetched or set aside."""

    def test_copies_with_coarse_times_are_recognised(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f%02d" % n: 100 for n in range(24)})
        kept = c.backup("b1", "a", "9M")
        c.start()
        c.settle()
        for step, names in ((10 ** 7, range(0, 8)), (10 ** 9, range(8, 16)), (2 * 10 ** 9, range(16, 24))):
            for n in names:
                path = c.kept_as("b1", "docs", "f%02d" % n)
                coarse = os.stat(path).st_mtime_ns // step * step
                os.utime(path, ns=(coarse, coarse))
        # One is really an older version, of the same two seconds.
        stale = c.kept_as("b1", "docs", "f20")
        coarse = os.stat(stale).st_mtime_ns
        write_file(stale, b"o" * 100)
        os.utime(stale, ns=(coarse, coarse))
        before = {name: info[0] for name, info in inodes(os.path.join(kept, "docs")).items()}
        os.unlink(os.path.join(kept, ".cbackup", "backup.db"))
        first = c.client("a")
        self.assertEqual((0, 1), (first.json["copied_files"], first.json["updated_files"]), str(first))
        c.settle()
        after = {name: info[0] for name, info in inodes(os.path.join(kept, "docs")).items()}
        self.assertEqual({"f20"}, {name for name in after if after[name] != before[name]})
        self.assertEqual([b"o" * 100], [data for _, data in c.attic("b1", "docs")])
        self.assertCopies(c, "docs", 1)
        self.assertSilent(c.run("a", "client"))
        self.assertRc(0, c.run("a", "verify"))


class LargeTablesTest(Case):
    """What is asked once a file costs the same whatever else there is, and what is written for many files is few commits."""

    def setUp(self):
        self.base = self.directory()

    def steps(self, count):
        """Thousands of SQLite's steps for a report of, and the forgetting of, 200 unknown paths beside `count` copies."""
        docs = os.path.join(self.base, "docs%d" % count)
        os.makedirs(docs)
        source = cbackup.Source("docs", "s", docs, 1)
        books = cbackup.Books(os.path.join(self.base, "books%d.db" % count), "s")
        self.addCleanup(books.close)
        books.configure(cbackup.Config(text="", sources={"docs": source}, backups={
            "b1": cbackup.Backup("b1", "a", "/b1", size=1 << 30)}))
        row, number, seen = books.source_row("docs"), books.backup_id("b1"), []
        books.report(number, row, 1, [(b"known/%d" % n, 10, 10, n) for n in range(count)])
        paths = [b"unknown/%d" % n for n in range(200)]
        books.db.set_progress_handler(lambda: seen.append(1), 1000)
        books.report(number, row, 1, [(path, 10, 10, 7) for path in paths])
        books.forget_copies(number, row["id"], paths)
        self.assertEqual(count, books.one("SELECT COUNT(*) FROM copies")[0])
        books.forget_copies(number, row["id"], [b"known/%d" % n for n in range(200)])
        self.assertEqual(count - 200, books.one("SELECT COUNT(*) FROM copies")[0])
        return len(seen)

    def test_reports_and_forgotten_copies_do_not_read_whole_tables(self):
        self.assertLess(self.steps(2000), 2 * self.steps(250))

    def test_a_rebuild_an_expiry_and_making_room_are_few_commits(self):
        kept = os.path.join(self.base, "b1")
        vault = cbackup.Vault(cbackup.Backup("b1", "a", kept, size=1 << 30), "c")
        vault.close()
        make_tree(kept, {"docs/%d" % n: 10 for n in range(600)})
        make_tree(kept, {".cbackup/attic/docs/20200101T000000Z/%d" % n: 10 for n in range(600)})
        vault = cbackup.Vault(cbackup.Backup("b1", "a", kept, size=1 << 30), "c")
        self.addCleanup(vault.close)
        commits = []
        vault.db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
        self.assertEqual(600, vault.rebuild(["docs"], lambda path: None))
        self.assertEqual((600, 6000), (vault.files(), vault.attic_bytes()))
        vault.spec = cbackup.Backup("b1", "a", kept, size=9000)
        self.assertEqual((0, 0), vault.make_room(0))
        self.assertEqual(3000, vault.attic_bytes())
        vault.expire_attic(1.0)
        self.assertEqual(0, vault.attic_bytes())
        self.assertFalse(os.path.exists(os.path.join(kept, ".cbackup", "attic", "docs")))
        self.assertLess(len(commits), 15)


class BatchesTest(Case):
    """What is done for many files at once is what would have been done for each."""

    def books_of(self, files, *backups, replicas=2):
        """(directory, its Source, books that know it and these backups)."""
        base = self.directory()
        docs = os.path.join(base, "docs")
        make_tree(docs, files)
        source = cbackup.Source("docs", "s", docs, replicas)
        books = cbackup.Books(os.path.join(base, "books.db"), "s")
        self.addCleanup(books.close)
        books.configure(cbackup.Config(text="", sources={"docs": source}, backups={
            name: cbackup.Backup(name, "h" + name, "/" + name, size=1 << 30) for name in backups}))
        return docs, source, books

    def test_groups_have_the_files_and_bytes_that_are_in_them(self):
        docs, source, books = self.books_of({"d%d/f%d" % (n % 7, n): 10 + n for n in range(700)}, "b1", "b2", "b3")
        cbackup.run_scan(books, source)
        row, backups, wanted = books.source_row("docs"), [books.hear(name, {"free": 1 << 30}) for name in ("b1", "b2")], []
        for backup in backups:
            wanted = books.claim(backup, row, 1 << 30, 1000, 1 << 30)
            self.added_up(books, {"c": 700 * (backups.index(backup) + 1)})
        facts = books.versions_of(row["id"], [each[0] for each in wanted])
        books.prove_all(row, [(one, b"d" * 32, False) for one in facts.values()])
        books.record_check(backups[0], row, [(one["id"], one["version"], b"d" * 32) for one in facts.values()])
        books.count_copies(backups[0], row["id"], [(name, facts[name]["version"], 1) for name in sorted(facts)[:600]])
        self.added_up(books, {"k": 600, "c": 800})
        entries, _ = books.catalog_entries(row["id"], 0, books.close_generation(row), (0, 0))
        self.assertEqual({("b1",): 600, (): len(entries) - 600},      # who has only claimed it is no holder
                         collections.Counter(entry[12] for entry in entries))
        for number in range(0, 700, 3):
            write_file(os.path.join(docs, "d%d/f%d" % (number % 7, number)), b"n" * (2000 + number))
        shutil.rmtree(os.path.join(docs, "d1"))
        cbackup.run_scan(books, source)
        self.added_up(books)
        with unittest.mock.patch.object(books, "up", lambda: 1e9):      # what is claimed by both is due twice
            books.expire(1e12)
        self.added_up(books)
        self.assertEqual(0, books.one("SELECT COUNT(*) FROM copies WHERE state='c'")[0])
        self.assertLess(0, books.one("SELECT COUNT(*) FROM copies")[0])
        books.db.execute("UPDATE entries SET blocked='unreadable' WHERE path=x'64322f6632'")
        for sources in ({}, {"docs": source}):      # its line goes, and comes again
            books.configure(cbackup.Config(text="", sources=sources, backups={}))
        self.added_up(books)
        self.assertEqual([(0, "!"), (0, "")], books.rows("SELECT n, key FROM groups WHERE files>0 ORDER BY files"))

    def test_others_are_served_in_between(self):
        docs, source, books = self.books_of({"f%d" % n: 1 for n in range(1200)}, "b1", replicas=1)
        written = [set()]   # the rows of each transaction; what triggers do has the text of what fired them
        books.db.set_trace_callback(lambda text: written.append(set()) if text == "COMMIT" else written[-1].add(text)
                                    if text.startswith(("INSERT", "UPDATE entries", "UPDATE copies")) else None)
        cbackup.run_scan(books, source)
        row, backup = books.source_row("docs"), books.hear("b1", {"free": 1 << 30})
        facts = books.versions_of(row["id"], [each[0] for each in books.claim(backup, row, 1 << 30, 2000, 1 << 30)])
        books.prove_all(row, [(one, b"d" * 32, False) for one in facts.values()])
        books.record_check(backup, row, [(one["id"], one["version"], b"d" * 32) for one in facts.values()])
        counted = books.count_copies(backup, row["id"], [(name, one["version"], 1) for name, one in facts.items()])
        self.assertEqual((1200, 1200), (len(facts), len(counted)))
        kinds = ("INSERT INTO entries", "INSERT INTO copies", "UPDATE entries SET digest", "UPDATE copies SET checked",
                 "UPDATE copies SET state='k'")
        for kind in kinds:
            with self.subTest(kind):
                rows = [sum(text.startswith(kind) for text in texts) for texts in written]
                self.assertGreaterEqual(sum(rows), 1200)
                self.assertLessEqual(max(rows), 550)

    def test_nobody_waits_while_all_that_a_scan_found_is_gone_through(self):
        docs, source, books = self.books_of({"d%d/f%d" % (n % 3, n): 1 for n in range(60)}, "b1")
        asked, wrong = [], []

        def lock():
            if books.lock.acquire(timeout=5):
                books.lock.release()
            else:
                wrong.append(asked[-1])

        def free(name, real):
            def method(found, *args, **options):
                asked.append(name)
                other = threading.Thread(target=lock)
                other.start()
                other.join()
                return real(found, *args, **options)
            return unittest.mock.patch.object(cbackup.Findings, name, method)
        with contextlib.ExitStack() as stack:
            for name in ("children", "enter", "lose", "match_moves", "_count", "gone", "changed", "lost", "moves",
                         "new_directories", "rest"):
                stack.enter_context(free(name, getattr(cbackup.Findings, name)))
            cbackup.run_scan(books, source)
            os.rename(os.path.join(docs, "d1"), os.path.join(docs, "new"))
            shutil.rmtree(os.path.join(docs, "d2"))
            cbackup.run_scan(books, source)
        self.assertEqual([], wrong)
        self.assertEqual(11, len(set(asked)))
        self.assertEqual({b"d0", b"new"}, {path for (path,) in books.rows("SELECT path FROM entries WHERE kind='d' AND path<>x''")})
        self.assertEqual(40, books.file_counts(1)[0])

    def test_a_source_whose_line_comes_again_is_active_when_all_of_its_copies_are_to_be_reported(self):
        docs, source, books = self.books_of({"f%d" % n: 1 for n in range(50)}, "b1", "b2")
        cbackup.run_scan(books, source)
        for name in ("b1", "b2"):
            books.claim(books.hear(name, {"free": 1 << 30}), books.source_row("docs"), 1 << 30, 100, 1 << 30)
        backups = {name: cbackup.Backup(name, "h" + name, "/" + name, size=1 << 30) for name in ("b1", "b2")}
        books.configure(cbackup.Config(text="", sources={}, backups=backups))
        again, slices, real = cbackup.Config(text="", sources={"docs": source}, backups=backups), [], books.regroup

        def regroup(files):
            slices.append(len(files))
            if len(slices) == 4:
                raise KeyboardInterrupt
            real(files)
        with unittest.mock.patch.object(cbackup, "APPLY_CHUNK", 20), unittest.mock.patch.object(books, "regroup", regroup):
            with self.assertRaises(KeyboardInterrupt):
                books.configure(again)
            self.assertEqual(([], 100 - 50), (books.active_sources(), books.one("SELECT COUNT(*) FROM copies")[0]))
            self.added_up(books)
            books.configure(again)
        self.assertLessEqual(max(slices), 20)
        self.assertEqual((["docs"], 0), (books.active_sources(), books.one("SELECT COUNT(*) FROM copies")[0]))
        self.added_up(books)
        self.assertTrue(books.recovering(books.source_row("docs")["id"]))

    def added_up(self, books, copies=None):
        """What the groups have is what is in them; and so many copies are of a state."""
        found = books.rows("SELECT grp, COUNT(*), SUM(size) FROM entries WHERE kind='f' GROUP BY grp ORDER BY grp")
        self.assertEqual(found, books.rows("SELECT id, files, bytes FROM groups WHERE files<>0 OR bytes<>0 ORDER BY id"))
        if copies:
            self.assertEqual(copies, dict(books.rows("SELECT state, COUNT(*) FROM copies GROUP BY state")))


if __name__ == "__main__":
    unittest.main()
