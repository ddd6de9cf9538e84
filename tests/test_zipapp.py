"""build_zipapp.sh: one file that is the program, the same bytes whoever builds it and whenever."""

import os
import shutil
import stat
import sys
import unittest
import zipfile

from tests.harness import PROGRAM, TOP, Case, Process, plain_environment, program, read_file, write_file


def build(folder, umask=0o022, **more):
    """Builds the zipapp from a copy of the project's files in `folder`; returns its path."""
    os.makedirs(folder, exist_ok=True)
    for path in (PROGRAM, os.path.join(TOP, "build_zipapp.sh")):
        shutil.copy(path, folder)
    # The python3 of the tests is the one that the script finds.
    tools = os.path.join(folder, "tools")
    os.makedirs(tools)
    os.symlink(sys.executable, os.path.join(tools, "python3"))
    env = plain_environment(folder, **more)
    env["PATH"] = tools + os.pathsep + env["PATH"]
    result = Process(["sh", os.path.join(folder, "build_zipapp.sh")], env, folder, umask=umask).wait(60)
    if result.rc != 0:
        raise AssertionError("build_zipapp.sh failed: %s" % result)
    return os.path.join(folder, "cbackup.pyz")


class BuildTest(Case):
    """Two builds are the same, byte for byte."""

    def test_two_builds_are_byte_identical(self):
        base = self.directory()
        first = build(os.path.join(base, "one"))
        second = build(os.path.join(base, "another place with blanks"), umask=0o077, TZ="Asia/Tokyo")
        self.assertEqual(read_file(first), read_file(second))

    def test_building_again_in_the_same_place_gives_the_same(self):
        folder = os.path.join(self.directory(), "one")
        first = read_file(build(folder))
        write_file(os.path.join(folder, "cbackup.conf"), "mine\n")      # what lies around does not get in
        os.utime(os.path.join(folder, "cbackup.py"), (1, 1))
        shutil.rmtree(os.path.join(folder, "tools"))
        self.assertEqual(first, read_file(build(folder)))

    def test_it_holds_the_module_and_its_start_and_nothing_else(self):
        path = build(os.path.join(self.directory(), "one"))
        with zipfile.ZipFile(path) as archive:
            self.assertEqual(["__main__.py", "cbackup.py"], sorted(archive.namelist()))
            self.assertEqual(read_file(PROGRAM), archive.read("cbackup.py"))
        self.assertTrue(os.stat(path).st_mode & stat.S_IXUSR)


class RunTest(Case):
    """cbackup.pyz is the same program as cbackup.py."""

    def setUp(self):
        self.base = self.directory()
        self.pyz = build(os.path.join(self.base, "build"))

    def run_pyz(self, *arguments):
        return Process(program(*arguments, file=self.pyz), plain_environment(self.base), self.base).wait(30)

    def test_help_is_the_same(self):
        result = self.run_pyz("--help")
        self.assertRc(0, result)
        plain = Process(program("--help"), plain_environment(self.base), self.base).wait(30)
        self.assertEqual(plain.stdout.replace("cbackup.pyz", "cbackup").replace("cbackup.py", "cbackup").split(),
                         result.stdout.replace("cbackup.pyz", "cbackup").replace("cbackup.py", "cbackup").split())

    def test_it_can_be_started_by_its_name(self):
        result = Process([self.pyz, "--help"], plain_environment(self.base), self.base).wait(30)
        self.assertRc(0, result)

    def test_exit_codes_come_through(self):
        self.assertRc(2, self.run_pyz("frobnicate"))
        self.assertRc(2, self.run_pyz("--home", self.base + "/nowhere", "status"))
        self.assertRc(0, self.run_pyz("--home", self.base + "/home", "init"))

    def test_a_cluster_of_zipapps_backs_up_and_restores(self):
        cluster = self.cluster("s", "a", file=self.pyz, replicas=1)
        source = cluster.source("docs", "s", {"f%d" % number: 1000 for number in range(10)})
        cluster.backup("b1", "a", "1M")
        cluster.start()
        cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        cluster.kill("s")
        result = cluster.client("a")
        self.assertRc(1, result)
        to = cluster.path("restored")
        self.assertRc(0, cluster.restore("a", "docs", to=to))
        self.assertSameTree(source, to)


if __name__ == "__main__":
    unittest.main()
