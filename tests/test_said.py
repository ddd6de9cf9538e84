"""What is said is true: what is not known, not read, not there or not right is never called safe, and is named."""

import json
import os
import shutil
import subprocess
import unittest

import cbackup
from tests.faults import mount_or_skip
from tests.harness import Case, Process, make_tree, quick_program, wait_for, write_file
from tests.test_travel import exchange, is_everywhere

HOUR, DAY = 3600, 86400


class SaidCase(Case):
    """Two files on s, one copy wanted, in the backup of a, or those of a and b; one cluster for all tests."""

    hosts = "a"

    @classmethod
    def setUpClass(cls):
        cls.c = cls.begin(cls.share_cluster("s", *cls.hosts, replicas=1, warn_after="2d"))
        cls.source = cls.c.sources["docs"].path
        cls.c.settle()

    @staticmethod
    def begin(cluster):
        cluster.source("docs", "s", {"f": 1000, "g": 2000})
        for host in cluster.hosts[1:]:
            cluster.backup("b" + host, host, "9M")
        cluster.start()
        return cluster

    def setUp(self):
        if set(self.c.hosts) - set(self.c.servers):
            self.c.start()

    def check(self, rc, host="a"):
        result = self.c.run(host, "status", "--check")
        self.assertRc(rc, result)
        self.assertEqual((1, ""), (len(result.stdout.splitlines()), result.stderr), str(result))
        self.assertTrue(result.stdout.startswith("safe: " if rc == 0 else "NOT SAFE: "), str(result))
        return result.stdout


class AsleepTest(SaidCase):
    """Hosts and backups that are not heard of; `client --json` names every host that could not be reached."""

    hosts = "ab"

    def test_a_source_that_is_asleep_is_safe_until_warn_after_and_then_named(self):
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
        self.c = self.begin(self.cluster("s", "a", replicas=1, warn_after="2d"))
        self.assertIn("docs", self.check(1))
        self.c.stop("s")
        self.assertRegex(self.check(1), "s asleep since .*; then: 2 of 2 files in docs have fewer than 1 copies")

    def test_a_backup_that_was_not_heard_of_is_named_and_by_passes_when_its_host_cannot_be_reached(self):
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
        self.c.start("b")
        self.c.passes("ba")      # a is to hear of it, too

    def test_what_state_has_of_hosts_may_be_garbage(self):
        self.c.stop("s")
        for garbage in (b"\0", b"[]", b'{"s": 1}', b'{"s": [1, {"sources": {"docs": 5}}]}'):
            write_file(os.path.join(self.c.home("a"), "state", "heard.json"), garbage)
            self.assertIn("nothing is known of it here", self.check(1))
        self.c.start("s")
        self.c.round()

    def test_hosts_without_sources_and_the_own_one_are_named_too(self):
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
        self.addCleanup(self.c.stop, "a")
        self.addCleanup(self.c.backups.update, self.c.backups.copy())
        self.c.backups["ba"] = self.c.backups["ba"]._replace(options={"size": "500"})
        self.c.stop("a")
        self.c.start("a")
        self.wrong("are used, and only 500 bytes may be")

    def test_read_only(self):
        path = self.c.backups["ba"].path
        mount_or_skip(self, "--bind", path, path)
        self.check(0)
        subprocess.check_call(["mount", "-o", "remount,bind,ro", path])
        self.wrong("read-only")


FAILING_SCAN = """
import os, sqlite3
whole = cbackup.run_scan
def run_scan(*words):
    if os.path.exists(%r):
        raise sqlite3.OperationalError("database or disk is full")
    return whole(*words)
cbackup.run_scan = run_scan
"""


class ScanTest(Case):
    """A look at a source that fails, or that is too old, is said; one odd file stops only itself."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1, scan="15m")
        c.variables["CBACKUP_TEST_BEFORE"] = FAILING_SCAN % c.path("break")
        cls.source = c.source("docs", "s", {"f": 1000})
        c.backup("ba", "a", "9M")
        c.start()

    def setUp(self):
        self.assertRc(0, self.c.client("a"))

    def assertCheck(self, rc, *words):
        check = self.c.run("a", "status", "--check")
        self.assertRc(rc, check)
        for word in words:
            self.assertIn(word, check.stdout)

    def test_a_scan_that_fails_makes_the_source_unsafe_and_every_pass_says_so(self):
        c = self.c
        write_file(c.path("break"), "")
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs cannot be looked at: database or disk is full")
        self.assertCheck(1, "docs cannot be looked at")
        os.unlink(c.path("break"))
        self.assertRc(0, c.client("a"))
        self.assertCheck(0)

    def test_a_look_that_is_too_old_is_not_safe(self):
        c = self.c
        c.stop("s")
        c.keys["read_rate"] = "1"       # the next look takes many minutes
        c.start("s")
        self.addCleanup(c.start, "s")
        self.addCleanup(c.stop, "s")
        self.addCleanup(c.keys.pop, "read_rate")
        self.assertCheck(0)
        c.advance(40 * 60)
        self.assertCheck(0)
        c.advance(40 * 60)
        self.assertCheck(1, "docs was last looked at 1 hour ago")

    def test_a_file_that_cannot_be_represented_is_named_and_the_others_go_on(self):
        c = self.c
        make_tree(self.source, {"odd": 10, "dir/odd": 10, "dir/g": 10})
        far = (1 << 62) + 10 ** 18
        for name in ("odd", "dir/odd"):
            os.utime(os.path.join(self.source, name), ns=(far, far))
        if os.stat(os.path.join(self.source, "odd")).st_mtime_ns != far:
            self.skipTest("this file system has no such times")
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs: 2 paths could not be read: ", "odd: its time cannot be represented")
        self.assertEqual({"f": ["ba"], "dir/g": ["ba"], "odd": [], "dir/odd": []}, c.copies_on_disk("docs"))
        self.assertCheck(1)
        for name in ("odd", "dir/odd"):
            os.utime(os.path.join(self.source, name))
        self.assertRc(0, c.client("a"))
        self.assertCopies(c, "docs", 1)
        self.assertCheck(0)


class ProofTest(unittest.TestCase):
    """What is only presumed to have its copies is said to be, and is as good as safe until warn_after."""

    def test_until_warn_after_and_then(self):
        for since, safe in ((99, True), (101, False)):
            found = cbackup.Verdict()
            cbackup._judge_proof(found, "docs", {"unproven_files": 3, "unproven_since": since}, 100)
            self.assertEqual(safe, found.safe)
            self.assertRegex("".join(found.trouble + found.remarks), "3 files of docs are still being compared")
        cbackup._judge_proof(found, "docs", {"unproven_files": 0, "unproven_since": None}, 100)
        self.assertEqual(1, len(found.trouble + found.remarks))


class UnreadTest(Case):
    """What could not be read, or taken, is never called safe, and is named in every pass until it is mended."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"other": 100})
        cls.part = c.source("part", "s", {"f": 1000})
        c.backup("ba", "a", "9M")
        without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        cls.humble = os.geteuid() != 0 or bool(shutil.which("setpriv")) and subprocess.call(
            without + ["true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
        if cls.humble and os.geteuid() == 0:
            c.prefix["s"] = without
        c.start()

    def shut(self, *names):
        """Takes away what the source's server needs to read it, until the end of the test."""
        if not self.humble:
            self.skipTest("root can read everything, and there is no setpriv that would take that from it")
        path = os.path.join(*names)
        self.addCleanup(os.chmod, path, 0o755)
        os.chmod(path, 0)

    def test_a_restore_counts_what_could_not_be_read(self):
        c = self.c
        make_tree(self.part, {"never": 10, "later": 10})
        self.shut(self.part, "never")
        self.assertRc(1, c.client("a"))
        self.shut(self.part, "later")
        self.assertRc(1, c.client("a"))
        to = c.path("to")
        result = c.restore("a", "part", to=to, options=["--json"])
        self.assertRc(1, result)
        self.assertEqual(["later", "never"], result.json["unreadable"])
        self.assertEqual([["never", True]], [[one["path"], "its own host could not read it" in one["reason"]]
                                             for one in result.json["missing"]])
        self.assertEqual(["f", "later"], sorted(name for name in os.listdir(to) if name[0] != "."))
        result = c.restore("a", "part", to=to)
        self.assertIn("; 2 could not be read by their own host at that time", result.stdout)

    def test_an_unreadable_directory(self):
        c = self.c
        make_tree(self.source, {"shut/g": 10})
        self.assertRc(0, c.client("a"))
        self.shut(self.source, "shut")
        for _ in range(2):
            result = c.client("a")
            self.assertRc(1, result)
            self.assertOneError(result, "docs: 1 path could not be read: shut: Permission denied")
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertEqual("NOT SAFE: docs: 1 path could not be read: shut: Permission denied\n", check.stdout)
        self.assertIn("    could not be read: shut: Permission denied\n", c.run("a", "status").stdout)
        self.assertTrue(os.path.exists(c.kept_as("ba", "docs", "shut/g")), "taken for deleted")
        os.chmod(os.path.join(self.source, "shut"), 0o755)
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.run("a", "status", "--check"))

    def test_what_no_backup_can_take(self):
        c = self.c
        self.assertRc(0, c.client("a"))
        write_file(c.kept_as("ba", "docs", "way"), "not of the program")
        make_tree(self.source, {"way/f": 100})
        self.assertRc(1, c.client("a"))
        result = c.client("a")      # it is not offered again, and named all the same
        self.assertRc(1, result)
        self.assertOneError(result, "docs: 1 file cannot be copied: way/f: ")
        self.assertRegex(c.run("a", "status", "--check").stdout, "docs: 1 file cannot be copied: way/f: ")
        os.unlink(c.kept_as("ba", "docs", "way"))
        c.advance(25 * HOUR)
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.run("a", "status", "--check"))


class NothingConfiguredTest(Case):
    """Without sources nothing is called safe, and nothing is said to fit."""

    def test_a_configuration_with_only_a_cluster(self):
        c = self.cluster("a")
        for home in (c.home("a"),):
            write_file(os.path.join(home, "cbackup.conf"), "[cluster]\nname = home\n")
        c._written = c.config()
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertEqual("NOT SAFE: no source is configured: nothing is backed up\n", check.stdout)
        self.assertIn("No source is configured", c.run("a", "status").stdout)
        plan = c.run("a", "plan")
        self.assertRc(1, plan)
        self.assertNotIn("It fits", plan.stdout)
        self.assertIn("No source is configured", plan.stdout)

    def test_a_source_that_its_server_does_not_know(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": 10})
        c.backup("ba", "a", "9M")
        c.start()
        self.assertRc(0, c.client("a"))
        write_file(os.path.join(c.home("a"), "cbackup.conf"), c.config().replace("[backups]", "more = s:/more\n[backups]"))
        check = c.run("a", "status", "--check")
        self.assertRc(1, check)
        self.assertIn("more is not known to its server on s", check.stdout)


class HeldConfigTest(Case):
    """A configuration that removes too much is held back on every machine that it comes to.

    One cluster for all tests; each begins with a right text that is in force on all machines."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=1)
        for name in ("one", "two", "three", "four"):
            c.source(name, "s", {"f": name} if name == "four" else ())
        for host in "ab":
            c.backup("b" + host, host, "9M")
        c.start()

    def setUp(self):
        c = self.c
        self.before = "# %s\n%s" % (self.id(), c.config())
        for host in c.hosts:
            self.edit(host, self.before)
        wait_for(lambda: exchange(c, "a") or exchange(c, "b") or is_everywhere(c, self.before.encode()), 20,
                 "not in force everywhere")
        self.version = self.state("s")["version"]

    def state(self, host):
        return cbackup.Home(self.c.home(host)).config_state()

    def edit(self, host, text):
        """An edit on one machine, later than all before it."""
        self.c.now += 5
        path = os.path.join(self.c.home(host), "cbackup.conf")
        write_file(path, text)
        os.utime(path, (os.stat(path).st_mtime + self.c.now,) * 2)

    def text(self, host):
        with open(os.path.join(self.c.home(host), "cbackup.conf")) as stream:
            return stream.read()

    def without(self, *names):
        return "".join(line for line in self.before.splitlines(True) if line.split(" ")[0] not in names)

    def test_held_until_accepted_anywhere_and_then_in_force_everywhere(self):
        c, small = self.c, self.without("one", "two", "three")
        self.edit("a", small)
        result = c.client("a")
        self.assertRc(1, result)
        self.assertIn("held back on b, s: it removes 3 of 4 sources (one, three, two)", result.stderr)
        wait_for(lambda: "3 of 4 sources (one, three, two)" in c.servers["s"].stderr, 10, "the server's log says nothing")
        for host in "sb":
            self.assertEqual(self.before, self.text(host))
        result = c.client("b")
        self.assertRc(1, result)
        self.assertIn("held back on b, s: it removes 3 of 4 sources (one, three, two)", result.stderr)
        check = c.run("b", "status", "--check")
        self.assertRc(1, check)
        self.assertIn("accept config", check.stdout)
        self.assertIn("held back on b, s", c.run("b", "status").stdout)
        self.assertEqual(4, len(c.run("b", "status", "--json").json["sources"]))
        result = c.run("b", "accept", "config")
        self.assertRc(0, result)
        self.assertIn("3 of 4 sources", result.stdout)
        self.assertEqual([small] * 3, [self.text(host) for host in "sab"])
        self.assertRc(0, c.client("b"))
        self.assertRc(0, c.run("a", "status", "--check"))

    def test_accepted_on_the_machine_of_the_edit(self):
        c, small = self.c, self.without("ba", "bb").replace("replicas = 1", "replicas = 2")
        self.edit("s", small)
        c.client("a")
        self.assertEqual(self.before, self.text("a"))
        self.assertRc(0, c.run("s", "accept", "config"))
        self.assertEqual([small] * 3, [self.text(host) for host in "sab"])

    def test_a_correction_anywhere_takes_its_place(self):
        c = self.c
        self.edit("a", self.without("one", "two", "three"))
        c.client("a")
        self.edit("s", self.without("one"))
        wait_for(lambda: self.state("s")["version"] == self.version + 2, 20, "the edit is not taken")
        self.assertRc(0, c.client("b"))
        self.assertRc(0, c.client("a"))
        self.assertEqual([self.without("one")] * 3, [self.text(host) for host in "sab"])
        self.assertRc(0, c.run("b", "status", "--check"))

    def test_half_of_them_or_another_name_goes_through(self):
        c = self.c
        self.edit("a", self.without("one", "two"))
        self.assertRc(0, c.client("a"))
        self.assertEqual(self.without("one", "two"), self.text("s"))

    def test_an_empty_one_is_never_a_version(self):
        c = self.c
        self.edit("a", "\n")
        result = c.client("a")
        self.assertRc(2, result)
        self.assertIn("is empty", result.stderr)
        home = cbackup.Home(c.home("b"))
        offer = dict(home.config_offer(), text="\n", version=self.version + 9)
        offer["sha256"] = cbackup.sha256_of(offer["text"])
        with self.assertRaises(cbackup.ConfigError):
            home.take_config(offer)
        self.assertEqual(self.before, self.text("b"))


class HeldListTest(Case):
    """Which files a source is held for, and what `accept` lets through."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        for name in ("docs", "known"):
            c.source(name, "s", {"f%02d" % number: 10 for number in range(40)})
        c.source("one", "s", {"f": 100})
        c.backup("ba", "a", "9M")
        c.start()
        c.settle()

    def test_the_files_are_named_the_first_at_once_and_all_with_v(self):
        c, source = self.c, self.c.sources["docs"].path
        for number in range(20):
            os.unlink(os.path.join(source, "f%02d" % number))
        write_file(os.path.join(source, "f30"), "changed")
        self.assertRc(1, c.client("a"))
        status = c.run("a", "status").stdout
        self.assertIn("f00 is gone\n", status)
        self.assertIn("and more: -v names all", status)
        self.assertIn("restore docs --force", status)
        self.assertIn("accept docs", status)
        named = [line.strip() for line in c.run("a", "-v", "status").stdout.splitlines() if line.startswith(" " * 8)]
        self.assertEqual(["f%02d is gone" % number for number in range(20)] + ["f30 has changed"], named)
        accepted = c.run("a", "accept", "docs")
        self.assertRc(0, accepted)
        self.assertIn("f00 is gone\n", accepted.stdout)
        self.assertRc(0, c.client("a"))
        self.assertNotIn("is gone", c.run("a", "status").stdout)

    def test_copies_that_new_books_do_not_know(self):
        """The books are lost while most of the source is gone: what the backups have of it is named."""
        c, source = self.c, self.c.sources["known"].path
        c.stop("s")
        shutil.rmtree(os.path.join(c.home("s"), "state"))
        for number in range(30):
            os.unlink(os.path.join(source, "f%02d" % number))
        write_file(os.path.join(source, "f30"), b"other than before")
        c.start("s")
        for _ in range(2):      # the second scan keeps the list
            self.assertRc(1, c.client("a"))
            named = [line.strip() for line in c.run("a", "status", "-v").stdout.splitlines()
                     if line.endswith((" is gone", " has changed"))]
            self.assertEqual(["f%02d is gone" % number for number in range(30)] + ["f30 has changed"], named)
        self.assertRc(0, c.run("s", "accept", "known", "--yes"))
        c.settle()

    def test_at_a_terminal_accept_asks(self):
        c = self.c
        os.unlink(os.path.join(c.sources["one"].path, "f"))
        c.client("a")
        for answer, code, state in ((b"no\n", 1, "held"), (b"yes\n", 0, "ok")):
            master, slave = os.openpty()
            self.addCleanup(os.close, master)
            with open(slave, "rb", 0) as terminal:
                os.write(master, answer)
                words = quick_program("--home", c.home("a"), "accept", "one")
                done = Process(words, c.environment("a"), terminal=terminal).wait()
            self.assertEqual((code, state), (done.rc, c.status()["sources"]["one"]["state"]), os.read(master, 10000))
        self.assertRc(0, c.client("a"))


class ClockTest(SaidCase):
    """A host whose clock is not that of the servers."""

    def test_it_says_so_and_expires_nothing(self):
        write_file(os.path.join(self.source, "f"), "changed")
        self.assertRc(0, self.c.client("a"))
        old = sum("attic" in name for name in kept_files(self.c, "a"))
        self.assertTrue(old)
        ahead = self.c.path("ahead")
        write_file(ahead, "%d\n" % (366 * DAY))
        result = self.c.run("a", "client", CBACKUP_TEST_CLOCK=ahead)
        self.assertRc(1, result)
        self.assertIn("this machine's clock is 366 days ahead of that of ", result.stderr)
        self.assertEqual(old, sum("attic" in name for name in kept_files(self.c, "a")))
        self.assertRc(0, self.c.client("a"))


def kept_files(cluster, host):
    path = cluster.backups["b" + host].path
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


if __name__ == "__main__":
    unittest.main()
