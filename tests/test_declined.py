"""Files that a backup cannot take: another takes them; what nobody can take is named, and nothing churns."""

import os
import shutil
import subprocess
import unittest

from tests.harness import DIRECTORY, Case, Link, Process, make_tree, one_in, quick_program, write_file

FILES = {"f%d" % number: 3000 + number for number in range(6)}

NO_COLONS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#define BAD(name) if (strchr(name, ':')) { errno = EINVAL; return -1; }
#define NEXT(type, name, ...) ((type (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name))
#define MODE va_list list; va_start(list, flags); mode_t mode = flags & O_CREAT ? va_arg(list, int) : 0; va_end(list);
#define OPEN(called) int called(const char *name, int flags, ...) { MODE if (flags & O_CREAT) BAD(name) \
    return NEXT(int, #called, const char *, int, ...)(name, flags, mode); }
#define OPENAT(called) int called(int at, const char *name, int flags, ...) { MODE if (flags & O_CREAT) BAD(name) \
    return NEXT(int, #called, int, const char *, int, ...)(at, name, flags, mode); }
#define MAKE(called) int called(char *name) { BAD(name) return NEXT(int, #called, char *)(name); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) MAKE(mkstemp) MAKE(mkstemp64)
int rename(const char *from, const char *to) { BAD(to) return NEXT(int, "rename", const char *, const char *)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { BAD(to)
    return NEXT(int, "renameat", int, const char *, int, const char *)(a, from, b, to); }
#define STAT(called) int called(int at, const char *name, void *info, int flags) { BAD(name) \
    return NEXT(int, #called, int, const char *, void *, int)(at, name, info, flags); }
STAT(fstatat) STAT(fstatat64)
int mkdir(const char *name, mode_t mode) { BAD(name) return NEXT(int, "mkdir", const char *, mode_t)(name, mode); }
int mkdirat(int at, const char *name, mode_t mode) { BAD(name)
    return NEXT(int, "mkdirat", int, const char *, mode_t)(at, name, mode); }
int symlinkat(const char *to, int at, const char *name) { BAD(name)
    return NEXT(int, "symlinkat", const char *, int, const char *)(to, at, name); }
int unlinkat(int at, const char *name, int flags) { BAD(name)
    return NEXT(int, "unlinkat", int, const char *, int)(at, name, flags); }
"""
"""A library that makes every file system one on which no name has a colon, as those of other systems are."""


@one_in(2)
class DeclinedTest(Case):
    """One copy wanted; the client of a always comes first, and cannot take what b can."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=1)
        cls.source = c.source("docs", "s", {"kept": 1000})
        c.backup("ba", "a", "1M")
        c.backup("bb", "b", "2M")
        c.start()
        c.settle(["a"])

    def tearDown(self):
        # Each test has its own files; the next pass takes those of the last one away.
        for name in os.listdir(self.source):
            path = os.path.join(self.source, name)
            if name != "kept":
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def add(self, files):
        make_tree(self.source, files)

    def where(self):
        return {name: "".join(sorted(backups)) for name, backups in self.c.copies_on_disk("docs").items() if name != "kept"}

    def assertDeclined(self, result, *words):
        """One file failed, it is named in a line with these words, and everything else was done."""
        self.assertRc(1, result)
        self.assertEqual(1, result.json["failed_files"], str(result))
        self.assertOneError(result, *words)

    def assertStill(self, named=None):
        """Passes over what has not changed say nothing but what cannot be done, transfer nothing and touch nothing."""
        before = {name: self.c.kept_inodes(name) for name in self.c.backups}
        for host in "ab":
            result = self.c.client(host)
            self.assertRc(1 if named else 0, result)
            if named:
                self.assertOneError(result, "docs", named)
            self.assertEqual((0, 0, 0, 0), tuple(result.json[key] for key in (
                "copied_files", "dropped_files", "failed_files", "wire_bytes")), str(result))
        self.assertEqual(before, {name: self.c.kept_inodes(name) for name in self.c.backups})

    def assertNamed(self, *words):
        """`status` says that one file is not safe, and which; `--check` says so too."""
        check = self.c.run("s", "status", "--check")
        self.assertRc(1, check)
        self.assertRegex(check.stdout, r"^NOT SAFE: 1 of \d+ files in docs ")
        lines = [line for line in self.c.run("s", "status").stdout.splitlines()
                 if line.startswith(" " * 8) and words[0] in line]
        self.assertEqual(1, len(lines), lines)
        for word in words:
            self.assertIn(word, lines[0])

    def test_larger_than_the_file_system_allows_is_taken_by_another_and_holds_up_no_other_file(self):
        # Where a file becomes too large, rsync ends at once: what stands behind it in the list was not even tried.
        self.add(dict(FILES, **{"b\u00fc\ttoo large": 300 << 10, "a": 10, "z": 10}))
        tools = self.c.path("tools")
        os.makedirs(tools, exist_ok=True)
        wrapper = os.path.join(tools, "rsync")
        write_file(wrapper, "#!/bin/sh\ntrap '' XFSZ\nulimit -f 100\nexec %s \"$@\"\n" % shutil.which("rsync"))
        os.chmod(wrapper, 0o755)
        result = self.c.client("a", PATH=tools + os.pathsep + os.environ["PATH"])
        self.assertDeclined(result, "too large: File too large")
        self.assertEqual(dict.fromkeys(list(FILES) + ["a", "z"], "ba"),
                         {name: there for name, there in self.where().items() if "too large" not in name})
        self.assertNamed("too large", "File too large")
        self.assertRc(0, self.c.client("b"))
        self.assertCopies(self.c, "docs", 1)
        self.assertStill()

    def test_a_name_that_is_impossible_in_one_backup_is_taken_by_another(self):
        library = self.c.path("no-colons.so")
        write_file(library + ".c", NO_COLONS)
        compiler = shutil.which("cc")
        if not compiler or subprocess.call([compiler, "-shared", "-fPIC", "-o", library, library + ".c", "-ldl"],
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
            self.skipTest("no C compiler, to make a file system without colons")
        self.add({"10:30": 500, "10.30": 500, "d:/f": 500, "empty:": DIRECTORY, "link:": Link("10.30")})
        def client():   # started by itself: the library is for the program as well as for its rsync
            return Process(["env"] + quick_program("--home", self.c.home("a"), "client", "--json"),
                           self.c.environment("a", LD_PRELOAD=library), self.c.path("a")).wait()
        result = client()
        self.assertRc(1, result)
        if "10:30" not in result.stderr:
            self.skipTest("no library can be put before that of the system here")
        self.assertEqual({"10:30": "", "10.30": "ba", "d:/f": ""}, self.where())
        for name in ("10:30", "d:/f", "empty:", "link:"):
            lines = [line for line in result.error_lines if name in line]
            self.assertEqual(1, len(lines), str(result))
            self.assertIn("Invalid argument", lines[0])
        self.assertEqual(2, result.json["failed_files"])
        self.assertEqual(0, client().json["failed_files"])
        self.assertRc(0, self.c.client("b"))
        self.assertCopies(self.c, "docs", 1)
        self.assertStill()
        # The catalog came too, so that from this backup alone all is known.
        self.c.stop("s", "b")
        to = os.path.join(self.directory(), "to")
        restored = self.c.restore("a", "docs", to=to)
        self.c.start("s", "b")
        self.assertRc(1, restored)
        self.assertTrue(os.path.isdir(os.path.join(to, "empty:")) and os.path.islink(os.path.join(to, "link:")))
        self.assertIn("10:30", restored.stderr)

    def test_what_cannot_be_put_into_one_backup_is_taken_by_another(self):
        # A file that is not of the program stands where a directory is needed. It is left alone.
        in_the_way = self.c.kept_as("ba", "docs", "way")
        write_file(in_the_way, "not of the program")
        self.addCleanup(os.unlink, in_the_way)
        self.add({"way/f": 100, "other": 100})
        self.assertDeclined(self.c.client("a"), "way/f", "cannot be put into")
        self.assertEqual({"way/f": "", "other": "ba"}, self.where())
        self.assertRc(0, self.c.client("b"))
        self.assertCopies(self.c, "docs", 1)
        self.assertStill()
        self.assertTrue(os.path.isfile(in_the_way))

    def test_larger_than_one_backup_is_taken_by_another(self):
        self.add({"large": 1200 << 10, "small": 100})
        for _ in range(2):
            self.assertRc(0, self.c.client("a"))
        self.assertEqual({"large": "", "small": "ba"}, self.where())
        self.assertRc(0, self.c.client("b"))
        self.assertCopies(self.c, "docs", 1)
        self.assertStill()

    def test_what_fits_nowhere_is_named_and_the_others_are_not_disturbed(self):
        self.add({"very large": 2100 << 10, "small": 100})
        for host in "ab":
            self.assertRc(0, self.c.client(host))
        self.assertEqual({"very large": "", "small": "ba"}, self.where())
        self.assertNamed("very large")
        self.assertStill()
        self.assertEqual((1, 2100 << 10), tuple(self.c.status()["sources"]["docs"][key] for key in (
            "underserved_files", "underserved_bytes")))

    def test_what_its_host_cannot_read_is_named_and_taken_when_it_can_be_read(self):
        if os.geteuid() == 0:
            # Without these powers root is refused like anybody else.
            without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
            if not shutil.which("setpriv") or subprocess.call(
                    without + ["true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
                self.skipTest("root can read everything, and there is no setpriv that would take that from it")
            self.c.stop("s")
            self.c.prefix["s"] = without
            self.addCleanup(self.c.start, "s")
            self.addCleanup(self.c.stop, "s")
            self.addCleanup(self.c.prefix.clear)
            self.c.start("s")
        self.add(dict(FILES, secret=200))
        secret = os.path.join(self.source, "secret")
        os.chmod(secret, 0)
        for host in "ab":       # it is not even offered, but named
            self.assertEqual("cbackup: docs: 1 path could not be read: secret: cannot be read by the server\n",
                             self.c.run(host, "client").stderr)
        self.assertEqual(dict(dict.fromkeys(FILES, "ba"), secret=""), self.where())
        self.assertNamed("secret", "unreadable")
        self.assertStill(named="secret")
        os.chmod(secret, 0o600)
        self.assertRc(0, self.c.client("a"))
        self.assertCopies(self.c, "docs", 1)
        self.assertStill()


if __name__ == "__main__":
    unittest.main()
