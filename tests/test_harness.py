"""The harness itself: what every other test relies on."""

import json
import os
import signal
import subprocess
import sys
import unittest

from tests.faults import process_table
from tests.harness import (DIRECTORY, TOP, Case, Cluster, Link, Process, differences, make_tree, plain_environment,
                           tree, wait_for)


def alive(pid):
    # A process whose parent is gone and that nobody has waited for yet is dead all the same.
    return process_table().get(pid, (0, "Z", ""))[1] not in "ZX"


class ProcessTest(Case):
    """A process that takes too long or prints a traceback fails the test; none outlives the tests."""

    def test_a_traceback_fails_the_test(self):
        with self.assertRaisesRegex(AssertionError, "a traceback"):
            Process([sys.executable, "-c", "1 / 0"]).wait(20)

    def test_a_process_that_takes_too_long_is_killed_and_fails_the_test(self):
        process = Process(["sleep", "1000"])
        with self.assertRaisesRegex(AssertionError, "still running"):
            process.wait(0.1)
        self.assertFalse(alive(process.pid))

    def test_processes_die_with_a_test_process_that_is_killed(self):
        code = ("import sys, time\n"
                "from tests.harness import Process\n"
                "print(Process(['sh', '-c', 'sleep 1000 & wait']).pid, flush=True)\n"
                "time.sleep(1000)\n")
        with subprocess.Popen([sys.executable, "-B", "-c", code], cwd=TOP, stdout=subprocess.PIPE) as tester:
            pid = int(tester.stdout.readline())
            self.assertTrue(alive(pid))
            tester.send_signal(signal.SIGKILL)
        wait_for(lambda: not alive(pid), 10, "the process outlived the test that started it")


class ClusterTest(Case):
    """A server that dies before it is ready is noticed at once and its message shown; ports do not collide."""

    def test_a_server_that_dies_at_its_start_is_reported_with_its_message(self):
        file = os.path.join(self.directory(), "broken.py")
        with open(file, "w") as stream:
            stream.write("import sys; sys.exit('the disk is on fire')\n")
        cluster = self.cluster("a", file=file)
        cluster.make_home("unused")
        with self.assertRaisesRegex(AssertionError, "the disk is on fire"):
            cluster.start("a")

    def test_two_clusters_never_share_a_port(self):
        clusters = [self.cluster(*"abcdefgh") for _ in range(4)]
        ports = [port for cluster in clusters for port in cluster.ports.values()]
        self.assertEqual(len(ports), len(set(ports)))

    def test_a_cluster_leaves_no_directory_when_all_was_well_and_keeps_it_otherwise(self):
        with Cluster("a") as good:
            pass
        self.assertFalse(os.path.exists(good.base))
        code = ("import json, sys, unittest\n"
                "from tests.harness import Case\n"
                "class T(Case):\n"
                "    def test(self):\n"
                "        print(json.dumps(self.cluster('a').base), flush=True)\n"
                "        self.fail()\n"
                "unittest.main(argv=['x'])\n")
        result = Process([sys.executable, "-B", "-c", code], plain_environment("/"), TOP)
        result.popen.wait(30)
        base = json.loads(result.stdout)
        self.addCleanup(lambda: subprocess.run(["rm", "-rf", base], timeout=30))
        self.assertIn("kept: %s" % base, result.stderr)
        self.assertTrue(os.path.isdir(base))
        result.popen.communicate(timeout=10)

    def test_advance_sets_the_clock_file_that_all_hosts_are_shown(self):
        cluster = self.cluster("a", "b")
        cluster.advance(60)
        cluster.advance(1.5)
        for host in cluster.hosts:
            with open(cluster.environment(host)["CBACKUP_TEST_CLOCK"]) as file:
                self.assertEqual(61.5, float(file.read()))


class TreeTest(Case):
    """tree() and differences() see every difference that a backup could make."""

    FILES = {"file": b"abc", "empty": b"", "dir/inner": b"x", "void": DIRECTORY, "link": Link("nowhere")}

    def change(self, path, action):
        if action == "bytes":
            info = os.stat(path)
            with open(path, "r+b") as file:
                file.write(b"z")
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        elif action == "mode":
            os.chmod(path, 0o751)
        elif action == "time":
            os.utime(path, ns=(1, os.stat(path).st_mtime_ns + 1))
        elif action == "target":
            os.unlink(path)
            os.symlink("elsewhere", path)
        elif action == "missing":
            os.unlink(path)

    def test_every_single_difference_is_seen(self):
        for name, action in [("file", "bytes"), ("file", "mode"), ("file", "time"), ("void", "mode"),
                             ("link", "target"), ("dir/inner", "missing"), ("link", "missing"), ("void", "time")]:
            with self.subTest(name=name, action=action):
                root = os.path.join(self.directory(), "t")
                make_tree(root, self.FILES)
                before = tree(root)
                self.assertEqual([], differences(before, root))
                self.change(os.path.join(root, name), action)
                # Removing or replacing an entry touches its directory too.
                lines = differences(before, root, ["dir.mtime_ns"] if action != "time" else [])
                self.assertTrue(lines and all(repr(name) in line for line in lines), lines)


if __name__ == "__main__":
    unittest.main()
