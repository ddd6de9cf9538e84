"""The harness itself: what every other test relies on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import cbackup
import tests

from tests.faults import process_table
from tests.harness import (DIRECTORY, PATIENCE, TOP, Case, Cluster, Link, Process, differences, make_tree, plain_environment,
                           tree, wait_for, write_file)


def alive(pid):
    # A process whose parent is gone and that nobody has waited for yet is dead all the same.
    return process_table().get(pid, (0, "Z", ""))[1] not in "ZX"


class ProcessTest(Case):
    """A process that takes too long or prints a traceback fails the test; none outlives the tests."""

    def test_a_traceback_fails_the_test(self):
        with self.assertRaisesRegex(AssertionError, "Traceback"):
            Process([sys.executable, "-S", "-c", "1 / 0"]).wait(20)

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
        with subprocess.Popen([sys.executable, "-S", "-B", "-c", code], cwd=TOP, stdout=subprocess.PIPE) as tester:
            pid = int(tester.stdout.readline())
            self.assertTrue(alive(pid))
            tester.send_signal(signal.SIGKILL)
        wait_for(lambda: not alive(pid), 10, "the process outlived the test that started it")


class TemporaryTest(Case):
    """Temporary files are in memory where that is possible, and nothing stays of a run unless a test failed."""

    def run_of_tests(self, code, top=TOP, **variables):
        """A Process that is the first one of its run, and the directory that it says."""
        env = plain_environment(self.directory(), **dict(variables, PYTHONPATH=top))
        for name in {"CBACKUP_TEST_CODE", "TMPDIR"} - set(variables):
            env.pop(name)
        process = Process([sys.executable, "-S", "-B", "-c", "import os, tempfile, tests\n"
                           "print(os.path.dirname(os.environ['CBACKUP_TEST_CODE']), tempfile.gettempdir(), flush=True)\n" + code],
                          env, top)
        folder, temporary = wait_for(lambda: process.stdout.split(), 20, lambda: process.stderr)
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return process, folder, temporary

    def without_program(self):
        """The tests in a directory of their own, with a program that is compiled at once."""
        top = self.directory()
        os.symlink(os.path.join(TOP, "tests"), os.path.join(top, "tests"))
        write_file(os.path.join(top, "cbackup.py"), "")
        return top

    def test_they_are_in_memory_unless_it_is_said_where(self):
        wanted, top = self.directory(), self.without_program()
        process, folder, temporary = self.run_of_tests("", top)
        self.assertRc(0, process.wait(20))
        self.assertEqual(tests.IN_MEMORY, os.path.dirname(temporary) if temporary == folder else None)
        process, folder, temporary = self.run_of_tests("", top, TMPDIR=wanted)
        self.assertRc(0, process.wait(20))
        self.assertEqual((wanted, wanted), (temporary, os.path.dirname(folder)))

    def test_they_are_not_where_there_is_little_room_or_no_program_may_run(self):
        place = self.directory()
        for blocks, flags, expected in ((1 << 20, 0, place), (1 << 17, 0, None), (1 << 20, getattr(os, "ST_NOEXEC", 8), None)):
            info = mock.Mock(f_bavail=blocks, f_frsize=4096, f_flag=flags)
            with mock.patch.object(os, "statvfs", return_value=info), mock.patch.object(os, "ST_NOEXEC", 8, create=True):
                self.assertEqual(expected, tests.in_memory(place))
        self.assertIsNone(tests.in_memory(os.path.join(place, "none")))

    def test_a_run_that_is_killed_leaves_nothing_and_one_whose_test_failed_only_what_that_left(self):
        make = "from tests.harness import Cluster; one = Cluster(%s)\n"
        killed, folder, _ = self.run_of_tests(make % "'a'" + "import time; print('made', flush=True); time.sleep(1000)\n")
        wait_for(lambda: "made" in killed.stdout, 20, lambda: killed.stderr)
        killed.kill()
        wait_for(lambda: not os.path.exists(folder), 10, "it is still there")
        code = make % "" + "one.close(); one.say_where(); print(one.base)\n"
        failed, folder, _ = self.run_of_tests(code, self.without_program())
        result = failed.wait(20)
        self.addCleanup(shutil.rmtree, result.stdout.split()[-1], ignore_errors=True)
        wait_for(lambda: not os.path.exists(folder + "/code"), 10, "the code is still there")
        self.assertTrue(os.path.isdir(result.stdout.split()[-1]), str(result))


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
                "        print(json.dumps(self.cluster().base), flush=True)\n"
                "        self.fail()\n"
                "unittest.main(argv=['x'])\n")
        result = Process([sys.executable, "-S", "-B", "-c", code], plain_environment("/"), TOP)
        result.ends_within(30)
        base = json.loads(result.stdout)
        self.addCleanup(lambda: subprocess.run(["rm", "-rf", base], timeout=30))
        self.assertIn("kept: %s" % base, result.stderr)
        self.assertTrue(os.path.isdir(base))

    def test_advance_sets_the_clock_file_that_all_hosts_are_shown(self):
        cluster = self.cluster("a", "b")
        cluster.advance(60)
        cluster.advance(1.5)
        for host in cluster.hosts:
            with open(cluster.environment(host)["CBACKUP_TEST_CLOCK"]) as file:
                self.assertEqual(61.5, float(file.read()))


class MistakeTest(Case):
    """A mistake in cbackup itself, wherever it is made, fails the test that met it."""

    def start(self, mistake):
        """A server and a backup whose program has one line more."""
        c = self.cluster("s", "a")
        c.variables["CBACKUP_TEST_BEFORE"] = mistake
        c.source("src", "s", {"file": b"x"})
        c.backup("ba", "a", "8M")
        return c

    def test_in_a_server_s_handler(self):
        c = self.start("cbackup.OPERATIONS['begin'].handler = lambda *_: 1 // 0")
        c.start()
        c.client("a")
        with self.assertRaisesRegex(AssertionError, "a request failed|Traceback"):
            c.stop("s")

    def test_in_a_server_s_thread(self):
        c = self.start("cbackup.run_scan = lambda *_: 1 // 0")
        server = c.spawn("s", "server")
        wait_for(lambda: "ZeroDivisionError" in server.stderr, 20, lambda: server.stderr)
        with self.assertRaisesRegex(AssertionError, "Traceback"):
            server.kill()

    def test_in_a_command(self):
        c = self.start("cbackup.Client.run = lambda *_: 1 // 0")
        with self.assertRaisesRegex(AssertionError, "Traceback"):
            c.client("a")
        with self.assertRaisesRegex(AssertionError, "a mistake in cbackup itself"):
            c.client("a", CBACKUP_TEST="")


class EnvironmentTest(Case):
    """What tests set in the environment counts only with CBACKUP_TEST=1, and is never in the way."""

    def test_nonsense_is_as_if_nothing_were_set(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("src", "s", {"file": b"x"})
        c.backup("ba", "a", "8M")
        nonsense = {"CBACKUP_TEST_" + name: "no:sense" for name in ("CLOCK", "IDLE", "KILL")}
        c.servers["s"] = c.spawn("s", "server", **nonsense)
        c._wait_ready("s")
        c.start("a")
        self.assertRc(0, c.client("a", **nonsense))
        self.assertRc(0, c.client("a", CBACKUP_TEST_KILL="any:", CBACKUP_TEST="0"))
        self.assertEqual(["ba"], c.copies_on_disk("src")["file"])

    def test_without_the_switch_nothing_of_it_counts(self):
        with mock.patch.dict(os.environ, CBACKUP_TEST_CLOCK=self.clock("1000000"), CBACKUP_TEST_IDLE="3"):
            os.environ.pop("CBACKUP_TEST", None)
            self.assertAlmostEqual(time.time(), cbackup.clock.now(), delta=60)
            self.assertEqual(cbackup.RSYNC_IDLE, cbackup.rsync_idle())
            os.environ["CBACKUP_TEST"] = "1"
            self.assertAlmostEqual(time.time() + 1000000, cbackup.clock.now(), delta=60)
            self.assertEqual(3, cbackup.rsync_idle())

    def clock(self, text):
        path = os.path.join(self.directory(), "clock")
        write_file(path, text)
        return path

    def test_the_clock_that_only_grows_does_so_when_the_date_is_set_back(self):
        path = self.clock("5000")
        with mock.patch.dict(os.environ, CBACKUP_TEST="1", CBACKUP_TEST_CLOCK=path):
            clock = cbackup.Clock()
            before, date = clock.steady(), clock.now()
            for text in ("-5000", "nan", "inf", "1e400", "\0", ""):
                write_file(path, text)
                self.assertGreaterEqual(clock.steady(), before)
                wait_for(lambda: clock.now() < date, 5, "the date is not what the file says")


class LargeTest(Case):
    """Large values that differ are a failure at once, not after minutes, and where they differ is said."""

    def test_what_differs_is_said_at_once(self):
        number, many = 60000, range(100000)
        for first, second, words in (
                ({n: "x%d" % n for n in many}, {n: "x%d" % (n - (n == number)) for n in many}, "[60000]: 'x60000' != 'x59999'"),
                (list(many), [n + (n == number) for n in many], "from 60000 on: [60000, 60001, 60002] != [60001, 60001, 60002]"),
                ("y\n" * number, "y\n" * number + "z", "from 120000 on: '' != 'z'"),
                (set(many), set(many) - {number}, "in one of them only: [60000]")):
            begun = time.monotonic()
            with self.assertRaises(AssertionError) as caught:
                self.assertEqual(first, second)
            self.assertIn(words, str(caught.exception))
            self.assertLess(len(str(caught.exception)), 5000)
            self.assertLess(time.monotonic() - begun, 20 * PATIENCE)


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
