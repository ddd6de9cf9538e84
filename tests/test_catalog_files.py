"""The catalogs that a backup keeps: files of news that make up lists, merged, pruned, and fetched again when they rot."""

import errno
import gzip
import hashlib
import os
import time
import unittest
import unittest.mock

import cbackup
from tests.harness import Case, Link, make_tree, write_file


class CatalogFilesTest(Case):
    """Files of news, without a cluster: what a list consists of stays the same whatever is done to its files."""

    def setUp(self):
        self.base = self.directory()
        self.vault = cbackup.Vault(cbackup.Backup("b", "a", os.path.join(self.base, "backup"), size=1 << 20), "cluster")
        self.addCleanup(self.vault.close)
        self.kept = self.vault.catalog_directory("docs")

    def write(self, since, upto, when, *rows):
        header = {"catalog": 1, "source": "docs", "books": "b", "since": since, "upto": upto, "time": when}
        cbackup.write_catalog(self.kept, header, [row.to_wire(cbackup.LEVEL) for row in rows])

    def row(self, name, size):
        return cbackup.CatalogRow(name, "f", size=size, mode=0o644)

    def sizes(self, at=None):
        """{path: size} of the newest list, or of that at a time"""
        found = {}
        for part in cbackup.catalog_chain(cbackup.list_catalogs(os.listdir(self.kept)), at):
            for row in cbackup.read_catalog(os.path.join(self.kept, part.name)):
                found[row.path] = row.size
                if row.kind is None:
                    del found[row.path]
        return found

    def fill(self, count=70, start=1000):
        self.write(0, 1, start, *[self.row(b"f%02d" % number, number) for number in range(count + 1)])
        for number in range(1, count):
            self.write(number, number + 1, start + number, self.row(b"f%02d" % number, 1000 + number),
                       cbackup.CatalogRow(b"f%02d" % (number + 1)))

    def test_a_list_of_many_news_is_made_one_of_two_files_and_says_the_same_at_any_time(self):
        self.fill()
        before = {at: self.sizes(at) for at in (None, 1000, 1020, 1069)}
        chain = cbackup.catalog_chain(cbackup.list_catalogs(os.listdir(self.kept)))
        self.assertEqual(70, len(chain))
        self.vault.merge_catalogs("docs", "b", chain)
        self.assertEqual(2, len(cbackup.catalog_chain(cbackup.list_catalogs(os.listdir(self.kept)))))
        self.assertEqual(before, {at: self.sizes(at) for at in before})
        self.write(70, 71, 1070, self.row(b"new", 5))
        self.assertEqual(before[None], {name: size for name, size in self.sizes().items() if name != b"new"})

    def test_one_that_lacks_lines_is_damaged_even_when_its_form_is_right(self):
        self.write(0, 1, 1000, self.row(b"a", 1), self.row(b"b", 2))
        path, = (os.path.join(self.kept, name) for name in os.listdir(self.kept))
        with gzip.open(path) as file:
            lines = file.readlines()
        for left in (lines[:2], lines[:1] + lines[2:], lines[:0]):
            with gzip.open(path, "wb") as file:
                file.writelines(left)
            with self.assertRaises(cbackup.DamagedCatalog):
                list(cbackup.read_catalog(path))

    def test_a_name_may_look_like_what_stands_between_two_lines(self):
        names = [b"plain", b"],[", b'a],["b', b"dir],[/],[", b"other"]
        for some in (names[:1] + names[4:], names):
            self.write(0, len(some), 1000, *[self.row(name, number) for number, name in enumerate(some)])
            self.assertEqual({name: number for number, name in enumerate(some)}, self.sizes())

    def test_what_no_kept_time_needs_is_deleted_and_nothing_else(self):
        now = int(time.time())
        self.fill(start=now - 69)
        chain = cbackup.catalog_chain(cbackup.list_catalogs(os.listdir(self.kept)))
        self.vault.merge_catalogs("docs", "b", chain)
        before = {at: self.sizes(now - at) for at in (0, 5, 10)}
        cbackup.prune_catalogs(self.kept, 10000)
        self.assertEqual(71, len(os.listdir(self.kept)))
        self.write(0, 71, now, self.row(b"whole", 1))       # a whole list; but 10 seconds back the others are needed
        cbackup.prune_catalogs(self.kept, 10)
        self.assertEqual({b"whole": 1}, self.sizes())
        self.assertEqual(before[10], self.sizes(now - 10))
        self.assertEqual(before[5], self.sizes(now - 5))
        cbackup.prune_catalogs(self.kept, -1)
        self.assertEqual(1, len(os.listdir(self.kept)))
        self.assertEqual({b"whole": 1}, self.sizes())


def books_of(case, files):
    """(directory, its Source, the books of its server), not looked at yet."""
    base = case.directory()
    top = os.path.join(base, "docs")
    make_tree(top, files)
    source = cbackup.Source("docs", "s", top, 1)
    books = cbackup.Books(os.path.join(base, "books.db"), "s")
    case.addCleanup(books.close)
    books.configure(cbackup.Config(text="", sources={"docs": source}))
    return top, source, books


class VanishingLinkTest(Case):
    """A symlink that is gone, or cannot be read, at the moment when it is looked at, stops nothing and is looked at again."""

    def test_a_symlink_that_could_not_be_read_is_in_no_list_until_it_can_be(self):
        _, source, books = books_of(self, {"f": b"1", "link": Link("f")})
        with unittest.mock.patch("os.readlink", side_effect=OSError(errno.EIO, "it cannot be read")):
            cbackup.run_scan(books, source)
        self.assertEqual({b"", b"f"}, self.listed(books))
        cbackup.run_scan(books, source)
        self.assertEqual({b"", b"f", b"link"}, self.listed(books))

    @staticmethod
    def listed(books):
        """The paths of a whole catalog, each of a form that a backup takes."""
        row = books.source_row("docs")
        upto = books.close_generation(row)
        return {cbackup.CatalogRow.from_json(cbackup.CatalogRow(path, kind, target=target).to_wire(1)).path for
                _, _, path, kind, _, _, _, _, _, _, target, *_ in books.catalog_entries(row["id"], 0, upto, (0, 0))[0]}


class GenerationTest(Case):
    """Every catalog that a server hands out has its own number and time, and all that is new is in a later one."""

    def setUp(self):
        self.top, self.source, self.books = books_of(self, {"f": b"1"})
        cbackup.run_scan(self.books, self.source)

    def news(self, since):
        """(number of the newest catalog, paths that are new in it)"""
        row = self.books.source_row("docs")
        upto = self.books.close_generation(row)
        return upto, {entry[2] for entry in self.books.catalog_entries(row["id"], since, upto, (0, 0))[0]}

    def test_two_that_ask_at_once_get_the_same_one_and_no_number_is_left_out(self):
        row = self.books.source_row("docs")
        self.assertEqual([1, 1], [self.books.close_generation(row) for _ in range(2)])
        self.assertEqual([1], [gen for gen, _, _ in self.books.generations(row["id"])])
        make_tree(self.top, {"g": b"2"})
        cbackup.run_scan(self.books, self.source)
        upto, paths = self.news(1)
        self.assertEqual((2, {b"", b"g"}), (upto, paths))
        self.assertLess(0, self.books.generation_time(row["id"], upto))

    def test_page_by_page_each_entry_comes_once(self):
        for some in ("abcdefg", "hijkl", "mn"):
            make_tree(self.top, {name: b"2" for name in some})
            cbackup.run_scan(self.books, self.source)
            self.news(0)
        row = self.books.source_row("docs")
        upto = self.books.close_generation(row)
        for since in range(upto + 1):
            whole = self.books.catalog_entries(row["id"], since, upto, (0, 0))[0]
            with unittest.mock.patch.object(cbackup, "PAGE", 3):
                found, more, cursor = [], True, (0, 0)
                while more:
                    page, more = self.books.catalog_entries(row["id"], since, upto, cursor)
                    found += page
                    self.assertLessEqual(len(page), 3)
                    cursor = page[-1][:2] if page else cursor
            self.assertEqual(whole, found)
            self.assertEqual(sorted(found), found)
            self.assertTrue(all(since < entry[0] <= upto for entry in found))
        self.assertEqual(15, len({entry[2] for entry in self.books.catalog_entries(row["id"], 0, upto, (0, 0))[0]}))

    def test_one_without_a_time_in_older_books_is_known_as_such(self):
        row = self.books.source_row("docs")
        with self.books.write() as db:
            db.execute("UPDATE sources SET gen=5")
            db.execute("UPDATE entries SET gen=2")
        self.assertEqual(4, self.books.close_generation(row))
        self.assertEqual([(4, 0.0, 1)], self.books.generations(row["id"]))
        self.assertEqual(0.0, self.books.generation_time(row["id"], 4))

    def test_a_digest_that_comes_when_a_catalog_was_just_closed_is_in_the_next_one(self):
        row = self.books.source_row("docs")         # as a request has it, while another one closes the catalog
        upto, _ = self.news(0)
        facts = self.books.version_of(row["id"], b"f")
        self.books.prove_all(row, [(facts, hashlib.sha256(b"1").digest(), False)])
        self.assertEqual((upto + 1, {b"f"}), self.news(upto))


class DamagedTest(Case):
    """A catalog that rots in a backup stops no pass, is found by the checking, and is fetched again."""

    def test_a_damaged_catalog_is_found_and_fetched_again(self):
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", {"f%d" % number: 100 for number in range(5)})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        kept = os.path.join(cluster.backups["b1"].path, ".cbackup", "catalog", "docs")
        for name in os.listdir(kept):
            write_file(os.path.join(kept, name), b"rot")
        make_tree(source, {"new": 100})
        self.assertRc(0, cluster.client("a"))
        verified = cluster.run("a", "verify")
        self.assertRc(1, verified)
        self.assertOneError(verified, "b1", "catalog", "damaged")
        self.assertRc(0, cluster.client("a"))
        self.assertRc(0, cluster.run("a", "verify"))
        cluster.kill("s")
        self.assertRc(0, cluster.restore("a", "docs", to=cluster.path("to")))
        self.assertSameTree(source, cluster.path("to"))


class PartOfACatalogTest(CatalogFilesTest):
    """Of a large catalog only those lines are understood that somebody wants; it is checked to its
    end all the same."""

    def test_some_paths_and_all_that_begins_so(self):
        names = [b"a", b"a/b", b"ab", b'q"uo\\te', b'q",x', b"\xff odd\n", "\u00e9/\U0001f600".encode(), b"z"]
        self.write(0, 1, 1, *[self.row(name, 1) for name in names])
        path = os.path.join(self.kept, os.listdir(self.kept)[0])

        def read(*arguments):
            return [row.path for row in cbackup.read_catalog(path, cbackup.PathsOf(*arguments))]
        for name in names:
            self.assertEqual([name], read([name]))
            self.assertEqual([name], read([name] + [b"none %d" % number for number in range(60)]))
        self.assertEqual([b"a", b"a/b", b"ab"], read([], [b"a"]))
        self.assertEqual([b"a", b"a/b"], read([b"a"], [b"a/"]))
        self.assertEqual([b"\xff odd\n"], read([], [b"\xff"]))
        self.assertEqual([b"a/b", b"ab", b"\xff odd\n"], [row.path for row in cbackup.read_catalog(
            path, cbackup.DirectoriesAnd(lambda name: name.endswith((b"b", b"\n"))))])
        with open(path, "rb") as stream:
            data = stream.read()
        write_file(path, data[:-20])
        with self.assertRaises(cbackup.DamagedCatalog):
            read([b"a"])

    def test_the_last_time_of_each_version(self):
        self.write(0, 1, 10, self.row(b"f", 1), self.row(b"g", 1))
        self.write(1, 2, 20, self.row(b"f", 2))
        self.write(2, 3, 30, self.row(b"f", 1))
        self.write(3, 4, 40, cbackup.CatalogRow(b"f"))
        self.assertEqual({(b"f", 1, 0): 30, (b"f", 2, 0): 20}, cbackup.times_of_versions(self.kept, [b"f"]))

if __name__ == "__main__":
    unittest.main()
