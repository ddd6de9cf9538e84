"""What is said is true: what is not known, not read, not there or not right is never called safe, and is named."""

import json
import os
import shutil
import subprocess
import sys
import unittest

import cbackup
from tests.faults import tmpfs_or_skip
from tests.harness import TOP, Case, Process, make_tree, write_file

HOUR, DAY = 3600, 86400


class SaidCase(Case):
    """Two files on s, one copy wanted, in the backups of a and b."""

    replicas = 1

    def setUp(self):
        self.c = c = self.cluster("s", "a", "b", replicas=self.replicas, warn_after="2d")
        self.source = c.source("docs", "s", {"f": 1000, "g": 2000})
        for host in "ab":
            c.backup("b" + host, host, "9M")
        c.start()

    def check(self, rc, host="a"):
        result = self.c.run(host, "status", "--check")
        self.assertRc(rc, result)
        self.assertEqual((1, ""), (len(result.stdout.splitlines()), result.stderr), str(result))
        self.assertTrue(result.stdout.startswith("safe: " if rc == 0 else "NOT SAFE: "), str(result))
        return result.stdout


class AsleepTest(SaidCase):
    """Hosts and backups that are not heard of."""

    def test_a_source_that_is_asleep_is_safe_until_warn_after_and_then_named(self):
        self.c.settle()
        self.c.stop("s")
        self.c.advance(3 * HOUR)
        self.assertIn("2 files of 1 source have all their copies; s asleep since 3 hours; safe then", self.check(0))
        self.assertIn("its server does not answer; what it said 3 hours ago:", self.c.run("a", "status").stdout)
        self.c.advance(2 * DAY)
        self.assertIn("s was last heard of 2 days ago", self.check(1))
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertIn("s was last heard of 2 days ago", result.stderr)
        self.c.start("s")
        self.assertRc(0, self.c.client("a"))
        self.assertRc(0, self.c.client("b"))
        self.check(0)

    def test_what_was_not_safe_when_it_fell_asleep_is_not_called_safe(self):
        self.assertIn("docs", self.check(1))
        self.c.stop("s")
        self.assertRegex(self.check(1), "s asleep since .*; then: 2 of 2 files in docs have fewer than 1 copies")

    def test_a_backup_that_was_not_heard_of_is_named_and_by_passes_when_its_host_cannot_be_reached(self):
        self.c.settle()
        self.c.advance(2 * DAY + HOUR)
        self.assertRc(0, self.c.client("a"))        # b is up, its client does not run
        self.assertIn("bb on b was last heard of 2 days ago", self.check(1))
        self.c.client("b")
        self.check(0)
        self.c.stop("b")
        self.assertIn("b asleep since ", self.check(0))
        self.assertRc(0, self.c.client("a"))
        self.c.advance(3 * DAY)
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "bb on b was last heard of 3 days ago")

    def test_what_state_has_of_hosts_may_be_garbage(self):
        self.c.settle()
        self.c.stop("s")
        for garbage in (b"\0", b"[]", b'{"s": 1}', b'{"s": [1, {"sources": {"docs": 5}}]}'):
            write_file(os.path.join(self.c.home("a"), "state", "heard.json"), garbage)
            self.assertIn("nothing is known of it here", self.check(1))


class UnreachableTest(SaidCase):
    """`client --json` names every host that could not be reached, and is not settled with them."""

    def test_hosts_without_sources_and_the_own_one_are_named_too(self):
        self.c.settle()
        self.c.stop("b")
        result = self.c.client("a")
        self.assertRc(0, result)
        self.assertEqual((["b"], False, ""), (result.json["unreachable"], result.json["settled"], result.stderr))
        self.c.stop("a")
        result = self.c.client("a")
        self.assertEqual((["a", "b"], False), (result.json["unreachable"], result.json["settled"]))
        self.c.start("a", "b")
        self.assertTrue(self.c.client("a").json["settled"])


class BackupStateTest(SaidCase):
    """A backup whose disk is not as it should be is not `ok`."""

    def wrong(self, *words):
        text = self.check(1)
        for word in ("ba on a",) + words:
            self.assertIn(word, text)
        self.assertNotEqual("ok", self.c.status("s")["backups"]["ba"]["state"])

    def test_not_there_of_another_backup_or_cluster_over_its_size(self):
        self.c.settle("a")
        self.c.settle()
        self.check(0)
        path = self.c.backups["ba"].path
        os.rename(path, path + ".away")
        self.wrong("is its disk mounted?")
        os.mkdir(path)
        self.wrong("is its disk mounted?")
        os.rmdir(path)
        os.rename(path + ".away", path)
        self.check(0)
        identity = os.path.join(path, ".cbackup", "identity")
        right = cbackup.read_json(identity)
        for key, value, words in (("cluster", "0" * 64, "another cluster"), ("id", "1" * 16, "not the one that was here")):
            write_file(identity, json.dumps(dict(right, **{key: value})))
            self.wrong(words)
        write_file(identity, json.dumps(right))
        self.c.backups["ba"] = self.c.backups["ba"]._replace(options={"size": "500"})
        self.c.stop("a")
        self.c.start("a")
        self.wrong("are used, and only 500 bytes may be")

    def test_read_only(self):
        path = self.c.backups["ba"].path
        tmpfs_or_skip(self, path, "8m")
        self.c.settle()
        self.check(0)
        subprocess.check_call(["mount", "-o", "remount,ro", path])
        self.wrong("read-only")


class ScanTest(Case):
    """A look at a source that fails, or that is too old, is said; one odd file stops only itself."""

    def test_a_scan_that_fails_makes_the_source_unsafe_and_every_pass_says_so(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": 1000})
        c.backup("ba", "a", "9M")
        c.start()
        c.settle()
        c.stop("s")
        command = [sys.executable, "-c", FAILING_SCAN, c.path("break"), "--home", c.home("s"), "server"]
        c.servers["s"] = Process(command, c.environment("s"), c.path("s"))
        c._wait_ready("s")
        self.assertRc(0, c.client("a"))
        write_file(c.path("break"), "")
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs cannot be looked at: database or disk is full")
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertIn("docs cannot be looked at", check.stdout)
        os.unlink(c.path("break"))
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.run("a", "status", "--check"))

    def test_a_look_that_is_too_old_is_not_safe(self):
        c = self.cluster("s", "a", replicas=1, scan="15m")
        c.source("docs", "s", {"f": 1000})
        c.backup("ba", "a", "9M")
        c.start()
        c.settle()
        self.assertRc(0, c.run("a", "status", "--check"))
        c.advance(40 * 60)
        self.assertRc(0, c.run("a", "status", "--check"))
        c.advance(40 * 60)
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertIn("docs was last looked at 1 hour ago", check.stdout)

    def test_a_file_that_cannot_be_represented_is_named_and_the_others_go_on(self):
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", {"f": 1000, "odd": 10, "dir/odd": 10, "dir/g": 10})
        c.backup("ba", "a", "9M")
        far = (1 << 62) + 10 ** 18
        for name in ("odd", "dir/odd"):
            os.utime(os.path.join(source, name), ns=(far, far))
        if os.stat(os.path.join(source, "odd")).st_mtime_ns != far:
            self.skipTest("this file system has no such times")
        c.start()
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs: 2 paths could not be read: ", "odd: its time cannot be represented")
        self.assertEqual({"f": ["ba"], "dir/g": ["ba"], "odd": [], "dir/odd": []}, c.copies_on_disk("docs"))
        self.assertRc(1, c.run("a", "status", "--check"))
        for name in ("odd", "dir/odd"):
            os.utime(os.path.join(source, name))
        self.assertRc(0, c.client("a"))
        self.assertCopies(c, "docs", 1)
        self.assertRc(0, c.run("a", "status", "--check"))


FAILING_SCAN = """
import os, sqlite3, sys
sys.path.insert(0, %r)
import cbackup
whole = cbackup.run_scan
def run_scan(*words):
    if os.path.exists(sys.argv[1]):
        raise sqlite3.OperationalError("database or disk is full")
    return whole(*words)
cbackup.run_scan = run_scan
sys.exit(cbackup.main(sys.argv[2:]))
""" % TOP


class UnreadTest(Case):
    """What could not be read, or taken, is never called safe, and is named in every pass until it is mended."""

    def test_an_unreadable_directory(self):
        without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        if os.geteuid() == 0 and (not shutil.which("setpriv") or subprocess.call(
                without + ["true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0):
            self.skipTest("root can read everything, and there is no setpriv that would take that from it")
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", {"f": 1000, "shut/g": 10})
        c.backup("ba", "a", "9M")
        c.prefix["s"] = without if os.geteuid() == 0 else []
        os.chmod(os.path.join(source, "shut"), 0)
        c.start()
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs: 1 path could not be read: shut: Permission denied")
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertEqual("NOT SAFE: docs: 1 path could not be read: shut: Permission denied\n", check.stdout)
        self.assertIn("    could not be read: shut: Permission denied\n", c.run("a", "status").stdout)
        os.chmod(os.path.join(source, "shut"), 0o755)
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.run("a", "status", "--check"))

    def test_what_no_backup_can_take(self):
        c = self.cluster("s", "a", replicas=1)
        source = c.source("docs", "s", {"other": 100})
        c.backup("ba", "a", "9M")
        c.start()
        c.settle()
        write_file(c.kept_as("ba", "docs", "way"), "not of the program")
        make_tree(source, {"way/f": 100})
        self.assertRc(1, c.client("a"))
        result = c.client("a")      # it is not offered again, and named all the same
        self.assertRc(1, result)
        self.assertOneError(result, "docs: 1 file cannot be copied: way/f: ")
        self.assertRegex(c.run("a", "status", "--check").stdout, "docs: 1 file cannot be copied: way/f: ")
        os.unlink(c.kept_as("ba", "docs", "way"))
        c.advance(25 * HOUR)
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.run("a", "status", "--check"))


if __name__ == "__main__":
    unittest.main()
