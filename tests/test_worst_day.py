"""The worst day: machines are gone, others die while they deliver, the restore itself is killed; what can come back does."""

import contextlib
import gzip
import json
import os
import pty
import re
import select
import shutil
import signal
import time
import unittest

from tests.disks import catalog_bytes, row
from tests.faults import Proxy, processes_with
from tests.harness import (DIRECTORY, FIFO, PATIENCE, TOP, Case, Link, Starter, free_port, inodes, make_tree, plain_environment,
                           quick_program, read_file, some_bytes, tree, wait_for, write_file)
from tests.members import Member

WORK = ".cbackup-restore"       # in the target, until a restore is complete


def back(to):
    """tree(to) without what an incomplete restore keeps there for the next run to go on with."""
    return {name: entry for name, entry in tree(to).items() if name.split(os.sep)[0] != WORK} if os.path.isdir(to) else {}


def bytes_below(root):
    """The sum of the sizes of the files below a directory that another process is writing to."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if not name.endswith((".db", ".db-wal", ".db-shm", ".gz")):
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total


class WorstDayCase(Case):
    """One cluster for the class: a source on s, which is gone, and copies on the hosts that are up between tests."""

    machines = 0

    def machine(self):
        """A machine with nothing but cbackup.conf and cluster.pem; returns its name."""
        WorstDayCase.machines += 1
        name = "fresh%d" % WorstDayCase.machines
        self.c.fresh_home(name)
        return name

    def down(self, *hosts):
        """These hosts are gone for this test."""
        self.c.kill(*hosts)
        self.addCleanup(lambda: self.c.start(*[host for host in hosts if host not in self.c.servers]))

    def limit(self, machine, rates=(), ports=(), gone=()):
        """On this machine: bytes a second for backups, other ports for hosts, and hosts that are gone: nothing listens there."""
        ports = dict({host: self.nowhere() for host in gone}, **dict(ports))
        lines = self.c.config().splitlines()
        for name, rate in dict(rates).items():
            lines = [line + " bwlimit=%s" % rate if line.startswith(name + " = ") else line for line in lines]
        for host, port in dict(ports).items():
            lines = ["%s = 127.0.0.1:%d" % (host, port) if line == "%s = 127.0.0.1:%d" % (host, self.c.ports[host]) else line
                     for line in lines]
        write_file(os.path.join(self.c.home(machine), "cbackup.conf"), "\n".join(lines) + "\n")

    def nowhere(self):
        port, holder = free_port()
        self.addCleanup(holder.close)
        return port

    def proxies(self, *hosts):
        """{host: Proxy} in front of the servers of hosts."""
        made = {host: Proxy(self.c.ports[host]) for host in hosts}
        for proxy in made.values():
            self.addCleanup(proxy.close)
        return made


class CompleteOrToldTest(WorstDayCase):
    """With 3 copies any two hosts may be gone and all is back; with three gone, what is missing is listed with its holders."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", "c", "d", replicas=3)
        cls.source = cls.c.source("docs", "s")
        for host in "abcd":
            cls.c.backup("b" + host, host, "9M")
        cls.c.start()
        # A quarter of the files each on all hosts but one: on those of the next three passes.
        for number, host in enumerate("abcdab"):
            make_tree(cls.source, {"%d/f%d" % (n % 3, n): b"file %d" % n for n in range(number, 24, 4) if number < 4})
            cls.c.client(host)
        make_tree(cls.source, {"void": DIRECTORY, "link": Link("0")})
        cls.c.settle()
        cls.c.kill("s")
        cls.holders = cls.c.copies_on_disk("docs")
        cls.tree = tree(cls.source)

    def restored(self, *gone, options=(), to=None, rc=0):
        """Restores without these hosts; returns (where, Result)."""
        machine = self.machine()
        self.limit(machine, gone=gone)
        to = to or self.c.path(machine, "to")
        result = self.c.restore(machine, "docs", to=to, options=options)
        self.assertRc(rc, result)
        return to, result

    def missing_without(self, *gone):
        return {name for name, holders in self.holders.items() if not {holder[1:] for holder in holders} - set(gone)}

    def test_the_files_are_spread_so_that_each_of_these_is_a_test(self):
        self.assertEqual({3}, {len(holders) for holders in self.holders.values()})
        self.assertEqual(4, len({tuple(holders) for holders in self.holders.values()}))

    def test_any_two_hosts_gone_and_everything_is_back(self):
        for gone in self.todays(("ab", "cd", "ad", "bc"), 1):
            with self.subTest(gone=gone):
                to, result = self.restored(*gone)
                self.assertSameTree(self.tree, to)
                self.assertEqual("", result.stderr)
                self.assertIn("everything is back", result.stdout)

    def test_three_hosts_gone_and_exactly_what_is_missing_is_told_with_the_hosts_that_had_it(self):
        for gone in self.todays(("abc", "bcd"), 1):
            with self.subTest(gone=gone):
                missing = self.missing_without(*gone)
                self.assertEqual(6, len(missing), "not a test")
                to, result = self.restored(*gone, rc=1)
                named = {name: line for line in result.error_lines for name in self.holders if " %s:" % name in line}
                self.assertEqual(missing, set(named), str(result))
                for name, line in named.items():
                    for host in gone:
                        self.assertRegex(line, r"\bb%s on %s\b" % (host, host))
                    up, = set("abcd") - set(gone)
                    self.assertNotRegex(line, r"\bb%s\b" % up)
                self.assertEqual(set(self.tree) - missing, set(back(to)))
                self.assertIn("6 files missing", result.stdout)
                # The same for programs.
                _, again = self.restored(*gone, rc=1, to=to, options=["--json"])
                self.assertEqual(missing, {entry["path"] for entry in again.json["missing"]})
                self.assertEqual((6, False), (again.json["missing_files"], again.json["complete"]))

    def test_disks_of_hosts_that_are_gone_make_up_for_them(self):
        disk = self.c.path("carried here")
        shutil.copytree(self.c.backups["ba"].path, disk, symlinks=True)
        for name in os.listdir(os.path.join(disk, ".cbackup")):
            if name.startswith("backup.db"):
                os.unlink(os.path.join(disk, ".cbackup", name))
        to, result = self.restored("a", "b", "c", options=["--from", disk])
        self.assertSameTree(self.tree, to)
        self.assertEqual("", result.stderr)
        shutil.copytree(self.c.backups["bb"].path, disk + " 2", symlinks=True)
        to, result = self.restored("a", "b", "c", "d", options=["--from", disk, "--from", disk + " 2"])
        self.assertSameTree(self.tree, to)

    def test_a_damaged_copy_of_one_run_does_not_stand_in_the_way_of_a_good_one_in_the_next(self):
        name = next(name for name, holders in self.holders.items() if "bd" in holders and "ba" in holders)
        path = self.c.kept_as("bd", "docs", name)
        content, info = read_file(path), os.stat(path)
        for new in (content[:-1] + b"X", content):
            with open(path, "r+b") as file:
                file.write(new)
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
            gone = ("a", "b", "c") if new != content else ()
            if gone:
                to, result = self.restored(*gone, rc=1)
                self.assertIn(" %s:" % name, result.stderr)
        to, _ = self.restored("d", to=to)
        self.assertSameTree(self.tree, to)

    def test_more_holders_gone_than_there_are_copies_is_an_error_in_words(self):
        to, result = self.restored("a", "b", "c", "d", rc=1)
        self.assertOneError(result, "ba on a", "bb on b", "bc on c", "bd on d")
        self.assertEqual({}, back(to))


class AllHoldersAtOnceTest(WorstDayCase):
    """Files come from all holders at once; slow, stalling and dying ones lose their work to the others."""

    COUNT, SIZE = 16, 200 << 10

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", "c", replicas=3)
        cls.source = cls.c.source("docs", "s")
        for n in range(cls.COUNT):
            make_tree(cls.source, {"d%d/%02d" % (n % 4, n): some_bytes(cls.SIZE, n)})
        for host in "abc":
            cls.c.backup("b" + host, host, "100M")
        cls.c.start()
        cls.c.settle()
        cls.c.kill("s")
        cls.tree = tree(cls.source)

    def begin(self, rates=(), ports=(), gone=(), options=(), **variables):
        machine = self.machine()
        self.limit(machine, rates, ports, gone)
        self.to = self.c.path(machine, "to")
        return self.c.spawn(machine, "restore", "docs", "--to", self.to, *options, **variables)

    def seconds(self, rates=(), **more):
        result = self.begin(rates, **more).wait()
        self.assertRc(0, result)
        self.assertSameTree(self.tree, self.to)
        return result.seconds

    def arrived(self, process, count):
        wait_for(lambda: not process.running or len(back_names(self.to)) >= count, 30, "files do not arrive")
        self.assertTrue(process.running, "not a test: it was over too soon")

    def test_three_holders_are_about_three_times_as_fast_as_one(self):
        # Both have the same start, which on a busy machine is as long as the rest: that is why less than 3 will do.
        rates = {"b" + host: "600K" for host in "abc"}
        three = self.seconds(rates)
        one = self.seconds(rates, gone="bc")
        self.assertGreater(one / three, 1.5, "one holder: %.1f s, three: %.1f s" % (one, three))

    def test_a_slow_holder_loses_its_work_to_the_others(self):
        rate = 25 << 10
        share = self.COUNT * self.SIZE / 3 / rate
        seconds = self.seconds({"ba": rate})
        self.assertLess(seconds, share / 3, "its share alone would take it %.0f s" % share)

    def test_holders_that_die_one_after_the_other_cost_nothing(self):
        process = self.begin({"b" + host: "500K" for host in "abc"})
        for count, host in ((2, "a"), (6, "b")):
            self.arrived(process, count)
            self.down(host)
        result = process.wait()
        self.assertRc(0, result)
        self.assertSameTree(self.tree, self.to)

    def test_a_holder_that_stalls_costs_nothing(self):
        proxies = self.proxies("a")
        proxies["a"].stall_after = 1 << 18
        seconds = self.seconds({"bb": "2M", "bc": "2M"}, ports={"a": proxies["a"].port}, CBACKUP_TEST_IDLE="3")
        self.assertLess(seconds, 25 * PATIENCE)

    def test_nobody_waits_for_one_that_stalls_when_the_others_have_delivered_everything(self):
        proxies = self.proxies("a")
        proxies["a"].stall_after = 1 << 18
        seconds = self.seconds(ports={"a": proxies["a"].port}, CBACKUP_TEST_IDLE="60")
        self.assertLess(seconds, 30 * PATIENCE, "the time after which a silent line is given up is 60 s")

    def test_all_that_die_are_named_and_the_next_run_goes_on(self):
        process = self.begin({"b" + host: "500K" for host in "abc"})
        self.arrived(process, 3)
        self.down("a", "b", "c")
        result = process.wait()
        self.assertRc(1, result)
        self.assertIn("NOT everything is back", result.stdout)
        before = {name: entry for name, entry in inodes(self.to).items() if name.split("/")[0] != WORK}
        self.assertGreaterEqual(len(before), 3)
        self.c.start("a", "b", "c")
        machine = self.machine()
        self.assertRc(0, self.c.restore(machine, "docs", to=self.to))
        self.assertSameTree(self.tree, self.to)
        self.assertEqual(before, {name: entry for name, entry in inodes(self.to).items() if name in before})


def back_names(to):
    """{relative path} of the files in a target that is being written to."""
    found = set()
    for folder, folders, names in os.walk(to):
        folders[:] = [name for name in folders if name != WORK]
        found |= {os.path.relpath(os.path.join(folder, name), to) for name in names}
    return found


class BadHoldersTest(WorstDayCase):
    """A holder whose disk has gone mad, or is somebody else's, costs nothing but its own copies."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        names = ["good", "fifo", "link", "dir", "huge", "out/f", "short", "other", "loop"]
        cls.source = cls.c.source("docs", "s", {name: 1000 + n for n, name in enumerate(names)})
        for host in "ab":
            cls.c.backup("b" + host, host, "9M")
        cls.c.start()
        cls.c.settle()
        cls.c.kill("s")
        cls.tree = tree(cls.source)
        cls.outside = cls.c.path("outside")
        make_tree(cls.outside, {"secret": read_file(os.path.join(cls.source, "link")),
                                "f": read_file(os.path.join(cls.source, "out/f"))})
        place = cls.c.kept_as("ba", "docs")
        for name in ("fifo", "link", "dir", "loop", "out/f"):
            os.unlink(os.path.join(place, name))
        os.rmdir(os.path.join(place, "out"))
        make_tree(place, {"fifo": FIFO, "link": Link(os.path.join(cls.outside, "secret")), "dir/x": b"x",
                          "out": Link(cls.outside), "loop": Link("loop")})
        for name, size in (("huge", 1 << 40), ("short", 10)):
            info = os.stat(os.path.join(place, name))
            os.truncate(os.path.join(place, name), size)
            os.utime(os.path.join(place, name), ns=(info.st_atime_ns, info.st_mtime_ns))
        write_file(os.path.join(place, "other"), b"x" * len(read_file(os.path.join(place, "other"))))

    def test_another_holder_makes_up_for_it_and_nobody_waits(self):
        machine = self.machine()
        to = self.c.path(machine, "to")
        before = inodes(self.outside)
        result = self.c.restore(machine, "docs", to=to, timeout=60)
        self.assertRc(0, result)
        self.assertSameTree(self.tree, to)
        self.assertEqual(before, inodes(self.outside))

    def test_alone_it_gives_what_is_good_and_the_rest_is_named(self):
        machine = self.machine()
        self.limit(machine, gone="b")
        to = self.c.path(machine, "to")
        result = self.c.restore(machine, "docs", to=to, timeout=60)
        self.assertRc(1, result)
        self.assertEqual({"good"}, {name for name, entry in back(to).items() if entry.kind != "dir"})
        for name in set(self.tree) - {"good", "out"}:
            self.assertIn(" %s:" % name, result.stderr)

    def test_its_catalogs_are_not_believed_when_they_lead_out(self):
        directory = os.path.join(self.c.backups["ba"].path, ".cbackup", "catalog", "docs")
        newest = max(os.listdir(directory))
        upto = int(newest.split("-")[1]) + 1
        machine = self.machine()
        outside = self.c.path(machine, "outside")
        make_tree(outside, {"victim": b"precious"})
        before = inodes(outside)
        for number, path in enumerate(("../outside/new", "a/../../outside/victim", outside + "/victim", "/etc/x")):
            name = "%012d-%012d-%d.gz" % (0, upto + number, time.time())
            write_file(os.path.join(directory, name), gzip.compress(catalog_bytes([row(path, content="x"), row("good")])))
            self.addCleanup(os.unlink, os.path.join(directory, name))
        to = self.c.path(machine, "to")
        result = self.c.restore(machine, "docs", to=to, timeout=60)
        self.assertRc(0, result)
        self.assertSameTree(self.tree, to)
        for number, path in enumerate(("../outside/new", "a/../../outside/victim", outside + "/victim", "/etc/x")):
            self.assertRegex(result.stderr, r"the catalog of ba on a: \S*-%012d-\d+\.gz is damaged: it has not a plain relative path: "
                             r"%s\n" % (upto + number, re.escape(path)))
        self.assertEqual(before, inodes(outside))
        self.assertEqual({"home", "outside", "to"}, set(os.listdir(self.c.path(machine))))


class InterruptedTest(WorstDayCase):
    """Interrupted at any instant and run again: it goes on where it was, also in the middle of a large file."""

    LARGE = 2 << 20

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        cls.source = cls.c.source("docs", "s", {"large": cls.LARGE})
        make_tree(cls.source, {"d%d/%d" % (n % 4, n): b"%d" % n for n in range(60)})
        make_tree(cls.source, {"one": b"hard links", "link": Link("large"), "closed/f": b"1"})
        os.link(os.path.join(cls.source, "one"), os.path.join(cls.source, "two"))
        os.chmod(os.path.join(cls.source, "closed"), 0o500)
        for host in "ab":
            cls.c.backup("b" + host, host, "100M")
        cls.c.start()
        cls.c.settle()
        cls.c.kill("s")
        cls.tree = tree(cls.source)

    def begin(self, half=True, rates=(), hosts="ab"):
        """A restore of which the large file is half there; returns (machine, Process). Its network to these hosts is
        counted; the others are gone."""
        machine = self.machine()
        self.counted, self.ports = {}, {host: self.nowhere() for host in "ab"}
        self.count(*hosts)
        self.limit(machine, rates or {"ba": "1M", "bb": "1M"}, self.ports)
        self.to = self.c.path(machine, "to")
        process = self.c.spawn(machine, "restore", "docs", "--to", self.to)
        if half:
            self.wait_for_half(process)
            self.assertTrue(process.running, "not a test: it was over too soon")
        return machine, process

    def count(self, *hosts):
        self.counted.update(self.proxies(*hosts))
        self.ports.update({host: proxy.port for host, proxy in self.counted.items()})

    def wait_for_half(self, process):
        work = os.path.join(self.to, WORK)
        wait_for(lambda: not process.running or bytes_below(work) > self.LARGE // 2, 30, "nothing comes")

    def again(self, machine, rc=0, **limits):
        """Runs the restore again; returns the bytes that came over the network."""
        self.limit(machine, ports=self.ports, **limits)
        before = sum(proxy.passed for proxy in self.counted.values())
        result = self.c.restore(machine, "docs", to=self.to)
        self.assertRc(rc, result)
        if not rc:
            self.assertSameTree(self.tree, self.to)
            self.assertFalse(os.path.lexists(os.path.join(self.to, WORK)))
        return sum(proxy.passed for proxy in self.counted.values()) - before

    def test_killed_in_the_middle_of_a_large_file_it_goes_on_there(self):
        machine, process = self.begin()
        process.kill()
        self.assertLess(self.again(machine), self.LARGE * 3 // 4)

    def test_an_interrupted_one_exits_130_leaves_no_process_and_goes_on(self):
        machine, process = self.begin()
        process.signal(signal.SIGINT)
        result = process.wait(20)
        self.assertRc(130, result)
        self.assertOneError(result, "interrupted")
        wait_for(lambda: not processes_with(self.to), 10, lambda: "left running: %s" % processes_with(self.to))
        self.assertLess(self.again(machine), self.LARGE * 3 // 4)

    def test_when_the_holder_that_delivered_half_of_it_is_gone_the_other_delivers_the_rest(self):
        machine, process = self.begin(hosts="a")
        process.kill()
        self.count("b")
        self.counted["a"].close()
        self.assertLess(self.again(machine), self.LARGE * 3 // 4)

    def test_a_holder_that_dies_in_the_middle_of_a_large_file_leaves_the_rest_to_the_other(self):
        for _ in range(10):
            machine, process = self.begin()
            # Which of the two delivers it is theirs to settle: the one whose line carried much more.
            second, first = sorted(self.counted, key=lambda host: self.counted[host].passed)
            if self.counted[second].passed < self.LARGE // 8:
                break
            process.kill()      # where the first one has stuttered, the second one delivers it as well
        else:
            self.fail("both deliver it, each time")
        self.down(first)
        self.assertRc(0, process.wait())
        self.assertSameTree(self.tree, self.to)
        self.assertLess(sum(proxy.passed for proxy in self.counted.values()), self.LARGE * 5 // 4)

    def test_one_path_that_was_interrupted_goes_on_as_well(self):
        machine, process = self.begin(half=False, hosts="a")
        process.kill()
        self.to = self.to + " of one path"
        process = self.c.spawn(machine, "restore", "docs", "large", "--to", self.to)
        self.wait_for_half(process)
        self.counted["a"].close()
        self.assertRc(1, process.wait())
        self.count("a")
        self.limit(machine, ports=self.ports)
        self.assertRc(0, self.c.restore(machine, "docs", "large", to=self.to))
        self.assertLess(0, self.counted["a"].passed)
        self.assertLess(self.counted["a"].passed, self.LARGE * 3 // 4)
        self.assertEqual({"large"}, set(os.listdir(self.to)))

    def test_killed_again_and_again_it_comes_to_its_end(self):
        machine, process = self.begin(half=False)
        process.kill()
        moments = [lambda: os.path.exists(os.path.join(self.to, WORK)),
                   lambda: os.path.exists(os.path.join(self.to, WORK, "plan.db")),
                   lambda: len(back_names(self.to)) > 5, lambda: len(back_names(self.to)) > 40,
                   lambda: bytes_below(self.to) > self.LARGE // 3]
        for moment in self.todays(moments, 3) + [lambda: os.path.exists(os.path.join(self.to, "large")),
                                                 lambda: os.path.lexists(os.path.join(self.to, "link"))]:
            process = self.c.spawn(machine, "restore", "docs", "--to", self.to)
            wait_for(lambda: moment() or not process.running, 30, "nothing happens")
            process.kill()
        came = self.again(machine)
        self.assertLess(came, self.LARGE // 4, "the large file was there already")


class BackInBusinessTest(WorstDayCase):
    """A source that was restored on a new machine of its name goes on as if nothing had been: no file is copied again."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b")
        files = {"d%d/f%d" % (n % 5, n): 20000 + n for n in range(40)}
        cls.source = cls.c.source("docs", "s", dict(files, large=3 << 20, void=DIRECTORY, link=Link("d1"), twin=b"twin"))
        os.link(os.path.join(cls.source, "twin"), os.path.join(cls.source, "d1/twin"))
        for host in "ab":
            cls.c.backup("b" + host, host, "100M")
        cls.c.start()
        cls.c.settle()
        cls.tree = tree(cls.source)
        cls.kept = {backup: cls.files_in(backup) for backup in ("ba", "bb")}
        # The machine burns, and another one gets its name and the cluster's key.
        cls.c.kill("s")
        os.rename(cls.source, cls.source + ".burnt")
        shutil.rmtree(cls.c.home("s"))
        cls.c.make_home("s", "s")
        write_file(os.path.join(cls.c.home("s"), "cbackup.conf"), cls.c.config())

    @classmethod
    def files_in(cls, backup):
        """Without the ctime: the same mode and time may be set once more."""
        return {name: facts[:3] for name, facts in cls.c.kept_inodes(backup).items()}

    def said(self):
        """What the source's server says of it."""
        with Member(self.c, "ba", "docs") as member:
            return member.ask("status")["sources"]["docs"]

    def assertNothingHappened(self, figures):
        for one in figures:
            for key in ("copied_files", "updated_files", "moved_files", "dropped_files", "failed_files", "wire_bytes"):
                self.assertEqual(0, one[key], "%s: %s" % (key, figures))
        self.assertEqual(self.kept, {backup: self.files_in(backup) for backup in ("ba", "bb")})

    def test_held_until_it_is_complete_and_then_no_file_is_copied(self):
        # Interrupted; the server is started too soon.
        process = self.c.spawn("s", "restore", "docs")
        wait_for(lambda: not process.running or len(back_names(self.source)) > 10, 30, "nothing comes back")
        process.kill()
        self.assertLess(len(back_names(self.source)), len(self.tree), "not a test: it was over too soon")
        self.c.start("s")
        self.assertNothingHappened([result.json for result in self.c.passes("ab")])
        self.assertEqual("held", self.said()["state"])
        # One path is restored: that does not make the whole complete.
        self.assertRc(0, self.c.restore("s", "docs", "twin"))
        self.assertNothingHappened([result.json for result in self.c.passes("ba")])
        self.assertEqual("held", self.said()["state"])
        self.assertRc(1, self.c.run("s", "accept", "docs"))
        # Now all of it.
        self.assertRc(0, self.c.restore("s", "docs"))
        self.assertSameTree(self.tree, self.source)
        self.assertNothingHappened(self.c.settle([["a", "b"]]))
        source = self.said()
        self.assertEqual(("ok", 0), (source["state"], source["underserved_files"]))
        self.assertEqual({"2": source["files"]}, {level: files for level, files in source["copies"].items() if files})


class CalmTest(WorstDayCase):
    """What a restore says: one sentence at its end, nothing else without a terminal, and on one how far it is."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=1)
        cls.source = cls.c.source("docs", "s", {"f%02d" % n: 30000 for n in range(40)})
        for host in "ab":
            cls.c.backup("b" + host, host, "700K")
        cls.c.start()
        cls.c.settle()
        cls.c.kill("s")
        cls.holders = cls.c.copies_on_disk("docs")
        cls.restored = None

    def all_back(self):
        """(target, Result) of a restore of everything, the same one for all tests."""
        to = self.c.path("all", "to")
        if not CalmTest.restored:
            self.c.fresh_home("all")
            CalmTest.restored = self.c.restore("all", "docs", to=to)
            self.assertRc(0, self.restored)
        return to, self.restored

    def test_everything_is_back_in_one_sentence(self):
        to, result = self.all_back()
        self.assertEqual("", result.stderr)
        self.assertRegex(result.stdout, r"\Adocs: everything is back [^\n]*\b40 files restored\b[^\n]*\n\Z")
        again = self.c.restore("all", "docs", to=to)
        self.assertRegex(again.stdout, r"\Adocs: everything is back [^\n]*\b40 were there already\b[^\n]*\n\Z")

    def test_not_everything_is_back_in_one_sentence(self):
        machine = self.machine()
        self.limit(machine, gone="a")
        result = self.c.restore(machine, "docs", to=self.c.path(machine, "to"))
        self.assertRc(1, result)
        count = sum("ba" in holders for holders in self.holders.values())
        self.assertRegex(result.stdout, r"\Adocs: NOT everything is back: %d files missing [^\n]*\n\Z" % count)
        self.assertEqual(count, len(result.error_lines))

    def test_quiet_says_no_more(self):
        machine = self.machine()
        self.c.write_config()
        result = self.c.run(machine, "-q", "restore", "docs", "f01", "--to", self.c.path(machine, "to"))
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)

    def test_json_has_all_figures_on_one_line(self):
        machine = self.machine()
        result = self.c.restore(machine, "docs", to=self.c.path(machine, "to"), options=["--json"])
        self.assertRc(0, result)
        self.assertEqual(("", 1), (result.stderr, result.stdout.count("\n")))
        figures = json.loads(result.stdout)
        self.assertLessEqual({"files", "bytes", "restored_files", "restored_bytes", "kept_files", "complete", "missing_files",
                              "refused_files", "catalog_time", "missing"}, set(figures))
        self.assertEqual((40, 1200000, 40, 1200000, 0, True, 0, 0, []), tuple(figures[key] for key in (
            "files", "bytes", "restored_files", "restored_bytes", "kept_files", "complete", "missing_files", "refused_files",
            "missing")))
        self.assertLess(abs(time.time() + self.c.now - figures["catalog_time"]), 3600)

    def test_a_dry_run_counts_what_is_there_and_what_is_in_the_way(self):
        machine = self.machine()
        to = self.c.path(machine, "to")
        shutil.copytree(self.all_back()[0], to, symlinks=True)
        names = sorted(self.holders)
        write_file(os.path.join(to, names[0]), "my own")

        def share(*options):
            figures = self.c.restore(machine, "docs", to=to, options=["--dry-run", "--json", *options]).json
            return (figures["kept_files"], figures["refused_files"], figures["missing_files"],
                    sum(one["files"] for one in figures["holders"].values()))
        self.assertEqual((len(names) - 1, 1, 0, 0), share())
        self.assertEqual((len(names) - 1, 1, 0, 1), share("--force"))
        self.assertEqual(b"my own", read_file(os.path.join(to, names[0])))

    def test_a_dry_run_says_what_would_come_from_where_and_writes_nothing(self):
        machine = self.machine()
        to = self.c.path(machine, "to")
        result = self.c.restore(machine, "docs", to=to, options=["--dry-run"])
        self.assertRc(0, result)
        for word in ("40 files", "ba on a", "bb on b"):
            self.assertIn(word, result.stdout)
        figures = self.c.restore(machine, "docs", to=to, options=["--dry-run", "--json"]).json
        self.assertEqual((40, 1200000, 0), (figures["files"], figures["bytes"], figures["missing_files"]))
        self.assertEqual({"ba on a", "bb on b"}, set(figures["holders"]))
        self.assertEqual(40, sum(share["files"] for share in figures["holders"].values()))
        self.limit(machine, gone="b")
        self.assertRc(1, self.c.restore(machine, "docs", to=to, options=["--dry-run"]))
        self.assertFalse(os.path.lexists(to))

    def test_exit_codes(self):
        machine = self.machine()
        to = self.c.path(machine, "to")
        for rc, words in ((2, ["restore"]), (2, ["restore", "photos", "--to", to]),
                          (2, ["restore", "docs", "--at", "x", "--to", to]),
                          (2, ["restore", "docs", "--frm", "x"]), (1, ["restore", "docs", "nothing like it", "--to", to]),
                          (0, ["restore", "docs", "f01", "--to", to])):
            with self.subTest(words=words):
                self.assertRc(rc, self.c.run(machine, *words))

    def test_on_a_terminal_it_says_how_far_it_is(self):
        machine = self.machine()
        self.limit(machine, {"ba": "200K", "bb": "200K"})
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        command = quick_program("--home", self.c.home(machine), "restore", "docs", "--to", self.c.path(machine, "to"))
        env = plain_environment(self.c.base, CBACKUP_TEST_CLOCK=self.c.path("clock"), COLUMNS="200")
        with open(theirs, "wb", buffering=0) as terminal, open(os.devnull, "wb") as nowhere:
            pid = Starter.ours().ask({"command": command, "environment": env, "cwd": TOP, "confined": {}}, nowhere, terminal)
        shown, deadline = b"", time.monotonic() + 60 * PATIENCE
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                data = b""
                with contextlib.suppress(OSError):      # that is how the end of a terminal looks
                    data = os.read(ours, 65536)
                if not data:
                    break
                shown += data
        codes = wait_for(lambda: [code for code in [Starter.ours().ask(pid)] if code is not None], 30, "it does not end")
        self.assertEqual([0], codes)
        text = shown.decode()
        line = max(text.split("\r"), key=lambda one: ("left" in one, len(one)))
        for pattern in (r"\bdocs\b", r"\b2 places\b", r"[\d.]+ [KM]B of [\d.]+ MB", r"[\d.]+ [KM]?B/s", r"\d+ s left",
                        r"\d+ of 40 files"):
            self.assertRegex(line, pattern)
        self.assertNotIn("\n", text.replace("\r\n", "\n").strip("\r\n "), "one line that is written again and again")
        self.assertEqual(b"", text.split("\r")[-1].strip().encode(), "the line is wiped at the end")


if __name__ == "__main__":
    unittest.main()
