"""Closed streams, full devices, odd temporary directories: the work is done, and the exit status
tells of the rest."""

import os
import subprocess
import unittest

from tests import COMPILED
from tests.harness import Case, plain_environment, program


class StreamsTest(Case):
    """One cluster; passes and other commands with standard streams that take nothing."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", replicas=1)
        cls.source = cls.c.source("docs", "s", {"f": 1000})
        cls.c.backup("ba", "a", "10M")
        cls.c.start()

    def shell(self, words, redirections, **more):
        """Runs the program by a shell, as a file; returns its exit status."""
        env = plain_environment(self.c.path("a"), CBACKUP_TEST_CLOCK=self.c.path("clock"), **more)
        return subprocess.run(
            ["sh", "-c", 'exec "$@" ' + redirections, "sh"] + program("--home", self.c.home("a"), *words, file=COMPILED),
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)

    def new_file(self, name):
        with open(os.path.join(self.source, name), "w") as stream:
            stream.write(name)

    def assertBackedUp(self, name):
        self.assertTrue(os.path.exists(self.c.kept_as("ba", "docs", name)), name)

    def test_a_pass_with_all_streams_closed(self):
        self.c.write_config()
        self.new_file("closed")
        self.assertEqual(0, self.shell(["client"], "<&- >&- 2>&-").returncode)
        self.assertBackedUp("closed")

    def test_each_closed_by_itself(self):
        self.c.write_config()
        for redirection, code in self.todays((("<&-", 0), (">&-", 1), ("2>&-", 0)), 1):
            with self.subTest(redirection=redirection):
                self.assertEqual(code, self.shell(["status"], redirection).returncode)

    def test_output_to_a_full_device(self):
        self.new_file("full")
        full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
        done = self.c.client("a", CBACKUP_TEST_BEFORE=full)
        self.assertEqual((1, "cbackup: not all could be printed: No space left on device\n"), (done.rc, done.stderr))
        self.assertBackedUp("full")
        self.assertEqual(2, self.shell(["restore"], "2>/dev/full").returncode)

    def test_a_reader_that_has_seen_enough_is_no_complaint(self):
        done = subprocess.run(["sh", "-c", '"$@" | :', "sh"] + program("--help", file=COMPILED), check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=plain_environment("/"))
        self.assertEqual(b"", done.stderr)

    def test_temporary_directories_with_odd_names(self):
        for number, name in self.todays(enumerate(("it's", 'a "b"', "new\nline", " blanks ", "#x", "not there")), 2):
            with self.subTest(name=name):
                directory = os.path.join(self.directory(), name)
                if name != "not there":
                    os.mkdir(directory)
                self.new_file("odd%d" % number)
                self.assertSilent(self.c.run("a", "client", TMPDIR=directory,
                                             CBACKUP_TEST_BEFORE="cbackup.tempfile.tempdir = None"))     # as at a start
                self.assertBackedUp("odd%d" % number)


if __name__ == "__main__":
    unittest.main()
