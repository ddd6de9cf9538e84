"""demo: the main job on one machine, shown to somebody who has just built the program."""

import functools
import os
import signal
import unittest

import cbackup
from tests import COMPILED
from tests.faults import processes_with
from tests.harness import (DIRECTORY, Case, Link, Process, inodes, make_tree, plain_environment, program,
                           quick_program, tree, wait_for)


class CompareTest(Case):
    """The demo says that all is as it was only when it is."""

    def test_each_difference_is_found(self):
        base = self.directory()
        source, target = os.path.join(base, "source"), os.path.join(base, "target")
        for path in (source, target):
            make_tree(path, {"a/f": b"123", "a/g": b"4", "link": Link("a/f"), "void": DIRECTORY})
            for above, folders, names in os.walk(path):
                for name in folders + names:
                    os.utime(os.path.join(above, name), (1e9, 1e9), follow_symlinks=False)
        demo = cbackup.Demo(source, base)
        self.assertEqual(set(), demo._differences(target))
        with open(os.path.join(target, "a/f"), "r+") as file:
            file.write("124")
        os.utime(os.path.join(target, "a/f"), (1e9, 1e9))
        self.assertEqual({b"a/f"}, demo._differences(target))
        os.rename(os.path.join(target, "a/g"), os.path.join(target, "a/h"))
        self.assertLessEqual({b"a/f", b"a/g", b"a/h"}, demo._differences(target))


class DemoTest(Case):
    """demo DIR backs up DIR, loses a host, restores, compares; it changes nothing in DIR and leaves nothing behind."""

    def setUp(self):
        base = self.directory()
        self.user, self.tmp, self.files = (os.path.join(base, name) for name in ("user", "tmp", "some files"))
        for path in (self.user, self.tmp):
            os.mkdir(path)
        make_tree(self.files, {"d%d/f%d" % (number % 5, number): 500 * number for number in range(60)})
        make_tree(self.files, {"link": Link("d1/f1"), "void": DIRECTORY, "empty": b""})

    def start(self, *arguments, words=functools.partial(program, file=COMPILED)):
        return Process(words("demo", *arguments), plain_environment(self.user, TMPDIR=self.tmp), self.user)

    def assertNothingLeft(self):
        self.assertEqual([], os.listdir(self.tmp))
        self.assertEqual([], os.listdir(self.user))
        wait_for(lambda: not self.processes(), 10, lambda: "still running: %s" % self.processes())

    def processes(self):
        """Processes that have the temporary directory in their command line."""
        return processes_with(self.tmp)

    def test_a_demo_over_a_directory_works_and_leaves_nothing_behind(self):
        before = tree(self.files), inodes(self.files)
        result = self.start(self.files).wait(90)
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)
        self.assertRegex(result.stdout, r"(?i)restore")
        self.assertRegex(result.stdout, r"(?i)kill|lost|gone")
        self.assertEqual(before, (tree(self.files), inodes(self.files)))
        self.assertNothingLeft()

    def test_an_interrupted_demo_leaves_nothing_behind_either(self):
        demo = self.start(self.files)
        wait_for(lambda: os.listdir(self.tmp) or not demo.running, 30, "the demo does nothing")
        wait_for(self.processes, 30, "the demo starts nothing")
        demo.signal(signal.SIGINT)
        result = demo.wait(30)
        self.assertRc(130, result)
        self.assertNothingLeft()

    def test_a_directory_that_is_not_there_is_named(self):
        result = self.start(self.files + " not", words=quick_program).wait(30)
        self.assertRc(2, result)
        self.assertOneError(result, self.files + " not")
        self.assertNothingLeft()


if __name__ == "__main__":
    unittest.main()
