"""Measurements that are not part of the tests; run from the project's top.

    python3 -m tests.bench claims [--hosts 50] [--files 200000] [--replicas 2]
    python3 -m tests.bench transfer [--files 20000] [--large 1G]
    python3 -m tests.bench idle [--files 100000]
    python3 -m tests.bench restore [--rate 4M] [--size 64M]
    python3 -m tests.bench lock [--files 1000000]
    python3 -m tests.bench against DIRECTORY [--files 20000] [--rounds 2]

`transfer`: a first pass and a restore of many small files and of a large one, over the time of a plain local rsync of the
same files in the same run; and what the bookkeeping takes.
`idle`: what a pass with nothing to do costs with few and with many files (their source was looked at shortly before), and the
memory of client and server.
`restore`: how much faster three backups behind limited lines are than one of them; three times would be perfect.
`lock`: for how long a server with many files holds its books up, and nobody else is answered.
`against`: the processor time of a copy (of two), a restored file, a pass that finds nothing changed and one with nothing to do, of this
tree and of another one (an older commit), in turn; the least of the rounds, on tmpfs.
`claims`: what a batch costs the server (milliseconds of CPU for the question what is missing, the claim, and the
confirmation) while the clients of many hosts fill their backups with many files, from the first batch to the last.
Every client claims in turn and keeps what it claimed until its next turn, as if all of them were copying.
"""

import argparse
import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import cbackup
from tests import IN_MEMORY
from tests.harness import Cluster, make_tree, some_bytes, write_file
from tests.placement import TrialWorld


def scratch():
    return tempfile.TemporaryDirectory(prefix="cbackup-bench-", dir=IN_MEMORY)


class ClaimBench(TrialWorld):
    """One server and the clients of `hosts` hosts, without a network and without files."""

    names = b"directory/file %06d.jpg"

    def __init__(self, base, hosts, files, replicas, seed=1):
        super().__init__(seed, base)
        sizes = [int(min(self.random.lognormvariate(0, 1.8), 2000) * (1 << 20)) for _ in range(files)]
        weights = {"b%d" % number: self.random.uniform(0.3, 1.5) for number in range(hosts)}
        self.source("s", "s", replicas)
        for name, weight in weights.items():
            self.backup(name, "h" + name, 1.03 * replicas * sum(sizes) * weight / sum(weights.values()))
        self.begin()
        self.add_files("s", sizes)
        self.books, self.row = self.books_of("s")
        self.free = {name: backup.size for name, backup in self.backups.items()}
        self.coming = dict.fromkeys(self.backups, ())
        for name in self.backups:
            self.demand(name)
        self.need = replicas * files
        self.done = 0

    def ask(self, backup, op, **fields):
        """(answer, milliseconds of CPU)"""
        begun = time.process_time()
        answer = self.services["s"].handle(dict(fields, op=op, backup=backup))
        return answer, 1000 * (time.process_time() - begun)

    def demand(self, backup):
        return self.ask(backup, "demand", capacity=self.backups[backup].size, free=self.free[backup])[1]

    def turn(self, backup, most_files):
        """Confirm what was claimed, claim more. Returns (milliseconds for demand, claim, confirmation; files claimed)."""
        confirm = self.confirm(backup)
        demand = self.demand(backup)
        answer, claim = self.ask(backup, "claim", source="s", free=self.free[backup], most_files=most_files,
                                 most_bytes=cbackup.BATCH_BYTES)
        self.coming[backup] = answer["rows"]
        self.free[backup] -= sum(row[1] for row in answer["rows"])
        return demand, claim, confirm, len(answer["rows"])

    def confirm(self, backup):
        rows = self.coming[backup]
        if not rows:
            return 0.0
        begun = time.process_time()
        facts = [self.books.version_of(self.row["id"], cbackup.as_raw(wanted[0])) for wanted in rows]
        self.books.record_check(self.books.backup_id(backup), self.row, [
            (fact["id"], fact["version"], b"d" * 32) for fact in facts])
        self.ask(backup, "placed", source="s", rows=[[r[0], r[6], 1] for r in rows])
        self.done += len(rows)
        self.coming[backup] = ()
        return 1000 * (time.process_time() - begun)


def bench_claims(args):
    print("%d hosts, %s files, %d replicas" % (args.hosts, format(args.files, ","), args.replicas))
    with scratch() as base, contextlib.closing(ClaimBench(base, args.hosts, args.files, args.replicas)) as bench:
        print("%6s  %9s  %29s  %29s" % ("", "", "16 files: ms of CPU for", "1,000 files: ms of CPU for"))
        print("%6s  %9s" % ("placed", "groups") + 2 * ("  %9s %9s %9s" % ("demand", "claim", "confirm")), flush=True)
        order, mark, rest = list(bench.backups), 0.0, 0
        while rest < len(order):
            if bench.done >= mark * bench.need:
                print(measured(bench), flush=True)
                mark += 0.1 if mark < 0.89 else 0.04
            bench.random.shuffle(order)
            rest = 0
            for name in order:
                rest += not bench.turn(name, cbackup.BATCH_FILES)[3]
        print("%5.1f%%  at the end" % (100 * bench.done / bench.need))


def measured(bench):
    """A line of medians: batches of 16 and of 1,000 by some clients. Batches that got less do not count."""
    found = []
    share = 100 * bench.done / bench.need
    groups = bench.books.one("SELECT COUNT(*) FROM groups WHERE files>0")[0]
    for most in (16, cbackup.BATCH_FILES):
        lines = []
        for name in bench.random.sample(sorted(bench.backups), min(20, len(bench.backups))):
            bench.confirm(name)
            demand, claim, _, count = bench.turn(name, most)
            if count:
                lines.append((demand, claim, bench.confirm(name) * most / count, count))
        middle = [sorted(column)[len(column) // 2] for column in zip(*lines)] or [0.0] * 4
        found += middle[:3]
    return "%5.1f%%  %9d" % (share, groups) + "".join("  %9.1f %9.1f %9.1f" % tuple(found[n:n + 3]) for n in (0, 3))


class TimedLock:
    """A lock like Store.lock that remembers how long it was held at most, for each `what`."""

    def __init__(self):
        self._lock = threading.RLock()
        self._depth, self._since, self.what, self.longest = 0, (0.0, 0.0), "", {}

    def __enter__(self):
        self._lock.acquire()
        if not self._depth:
            self._since = time.perf_counter(), time.thread_time()
        self._depth += 1

    def __exit__(self, *exc):
        self._depth -= 1
        if not self._depth:
            held = time.perf_counter() - self._since[0], time.thread_time() - self._since[1]
            self.longest[self.what] = tuple(map(max, self.longest.get(self.what, (0.0, 0.0)), held))
        self._lock.release()


def bench_lock(args):
    part = max(1, args.files // 10)
    with scratch() as base:
        top = os.path.join(base, "docs")
        for number in range(args.files):
            folder = os.path.join(top, "p%d" % (number // part), "d%d" % (number // 1000))
            if number % min(part, 1000) == 0:
                os.makedirs(folder, exist_ok=True)
            os.close(os.open(os.path.join(folder, "f%d" % number), os.O_CREAT))
        config = cbackup.parse_config("[cluster]\nname = t\nreplicas = 1\n[hosts]\ns = x\na = x\n[sources]\ndocs = s:%s\n"
                                      "[backups]\nba = a:/ba size=1T\n" % top)
        service = cbackup.Service(cbackup.Home(os.path.join(base, "home"), "s"), config, "s")
        books = service.books
        books.lock = lock = TimedLock()
        lock.what = "a first scan"
        cbackup.run_scan(books, config.sources["docs"])
        row, backup = books.source_row("docs"), books.hear("ba", {"free": 1 << 40})
        while True:
            lock.what = "a claim of %s" % format(cbackup.BATCH_FILES, ",")
            rows = books.claim(backup, row, 1 << 40, cbackup.BATCH_FILES, 1 << 40)
            if not rows:
                break
            lock.what = "its confirmation"
            facts = books.versions_of(row["id"], [wanted[0] for wanted in rows])
            books.prove_all(row, [(one, b"d" * 32, False) for one in facts.values()])
            books.record_check(backup, row, [(one["id"], one["version"], b"d" * 32) for one in facts.values()])
            books.count_copies(backup, row["id"], [(name, one["version"], 1) for name, one in facts.items()])
        lock.what = "a scan, %s files moved" % format(part, ",")
        os.rename(os.path.join(top, "p0"), os.path.join(top, "q0"))
        cbackup.run_scan(books, config.sources["docs"])
        lock.what = "a scan, %s files gone" % format(part, ",")
        shutil.rmtree(os.path.join(top, "p1"))
        cbackup.run_scan(books, config.sources["docs"])
        lock.what = "a backup ceases to count"
        books.expire(-1.0)
        lock.what = "a backup counts again"
        books.hear("ba", {})
        lock.what = "a page of its report"
        serial = books.start_report()
        page = books.rows("SELECT path FROM entries WHERE kind='f' LIMIT ?", cbackup.PAGE)
        books.report(backup, row, serial, [(name, 0, 1, 2) for (name,) in page])
        lock.what = "the report's end: all else is not there"
        books.end_report(backup, row, serial)
        print("%-42s %10s %10s" % ("%s files; the longest, ms" % format(args.files, ","), "time", "processor"))
        for what, (wall, used) in lock.longest.items():
            print("%-42s %10.0f %10.0f" % (what, 1000 * wall, 1000 * used))
        books.close()


# ---- real clusters ----------------------------------------------------------------------------------------------

def timed(function):
    """(what it returns, seconds)"""
    begun = time.monotonic()
    return function(), time.monotonic() - begun


def must(result):
    """The Result of a command that has done everything."""
    if result.rc != 0:
        raise SystemExit("failed: %s" % result)
    return result


def make_files(top, count, size, large):
    """`count` files of `size` bytes, 500 a directory, and one of `large` bytes when that is not 0."""
    content = some_bytes(size, "bench")
    for number in range(count):
        folder = os.path.join(top, "d%04d" % (number // 500))
        if number % 500 == 0:
            os.makedirs(folder)
        write_file(os.path.join(folder, "f%03d" % (number % 500)), b"%08d" % number + content[8:])
    if large:
        block = some_bytes(1 << 20, "large")
        with open(os.path.join(top, "large"), "wb") as file:
            for number in range(large >> 20):
                file.write(b"%08d" % number + block[8:])


def bench_transfer(args):
    print("%-22s %10s %10s %10s   %s" % ("", "rsync", "pass", "restore", "pass and restore over rsync"))
    large = cbackup.parse_size(args.large)
    for name, count, size in (("%d files of 4 KiB" % args.files, args.files, 4096), ("one file of " + args.large, 0, 0)):
        with Cluster("s", "a", replicas=1) as cluster:
            source = cluster.source("docs", "s")
            make_files(source, count, size, 0 if count else large)
            cluster.backup("b", "a", "100G")
            cluster.start()
            must(cluster.run("a", "status"))
            _, plain = timed(lambda: subprocess.check_call(["rsync", "-a", source + "/", cluster.path("plain")]))
            _, once = timed(lambda: must(cluster.run("a", "client", timeout=1800)))
            _, back = timed(lambda: must(cluster.run("a", "restore", "docs", "--to", cluster.path("back"), timeout=1800)))
            print("%-22s %9.1fs %9.1fs %9.1fs   %.1f and %.1f" % (name, plain, once, back, once / plain, back / plain), flush=True)
            if count:
                print("bookkeeping, bytes a file: %d on the source's host, %d in the backup" % (
                    os.path.getsize(os.path.join(cluster.home("s"), "state", "books.db")) / count,
                    bytes_below(os.path.join(cluster.backups["b"].path, ".cbackup")) / count), flush=True)


def bytes_below(top):
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(top) for name in names)


def bench_idle(args):
    print("%10s %12s %16s %16s" % ("files", "idle pass", "client's memory", "server's memory"))
    for count in (100, args.files):
        with Cluster("s", "a", replicas=1, scan_min="1h") as cluster:
            make_files(cluster.source("docs", "s"), count, 100, 0)
            cluster.backup("b", "a", "100G")
            cluster.start()
            must(cluster.run("a", "client", timeout=1800))
            must(cluster.run("a", "client", timeout=1800))
            seconds = min(timed(lambda: must(cluster.run("a", "client")))[1] for _ in range(5))
            with open("/proc/%d/status" % cluster.servers["s"].pid) as file:
                server = int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1))
            client = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print("%10d %11.2fs %12d MiB %12d MiB" % (count, seconds, client >> 10, server >> 10), flush=True)


def bench_restore(args):
    with Cluster("s", "a", "b", "c", replicas=3) as cluster:
        source = cluster.source("docs", "s")
        make_tree(source, {"d%d/f%03d" % (n % 7, n): cbackup.parse_size(args.size) // 200 for n in range(200)})
        for host in "abc":
            cluster.backup("b" + host, host, "100G")
        cluster.start()
        cluster.settle()
        for name, backup in cluster.backups.items():
            cluster.backups[name] = backup._replace(options=dict(backup.options, bwlimit=args.rate))
        _, three = timed(lambda: must(cluster.restore("a", "docs", to=cluster.path("three"), timeout=1800)))
        cluster.kill("b", "c")
        _, one = timed(lambda: must(cluster.restore("a", "docs", to=cluster.path("one"), timeout=1800)))
        print("%s at %s/s a backup: from one in %.1f s, from three in %.1f s: %.2f times as fast" % (
            args.size, args.rate, one, three, one / three))


AGAINST = """
import random, resource, subprocess, sys
sys.path.insert(0, ".")
from tests.harness import Cluster

def seconds(pid):
    with open("/proc/%d/stat" % pid) as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:15])) / 100

def run(cluster, host, *args):
    command = [sys.executable, "cbackup.pyz", "--home", cluster.home(host)]
    before, servers = resource.getrusage(resource.RUSAGE_CHILDREN), sum(seconds(s.pid) for s in cluster.servers.values())
    subprocess.run(command + list(args), env=cluster.environment(host), check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return client + sum(seconds(s.pid) for s in cluster.servers.values()) - servers

count = int(sys.argv[1])
r = random.Random(1)
files = {"d%03d/f%05d" % (n // 200, n): int(min(200 << 10, max(200, r.lognormvariate(8.3, 1.3)))) for n in range(count)}
with Cluster("s", "a", "b", replicas=2) as c:
    c.source("docs", "s", files)
    for host in "ab":
        c.backup("b" + host, host, size="100G")
    c.start()
    c.write_config()
    for host in "ab":
        run(c, host, "--version")
    found = [sum(run(c, host, "client") for host in "ab") / count / 2 * 1e6]
    found.append(run(c, "a", "restore", "docs", "--to", c.path("back")) / count * 1e6)
    for host in "ab":
        run(c, host, "client")
    found.append(min(run(c, "a", "client") for _ in range(3)) * 1000)
    found.append(min(run(c, "a", "--version") for _ in range(3)) * 1000)
    print(*found)
"""


def bench_against(args):
    names = ("a copy, us", "a restored file, us", "nothing changed, ms", "a start, ms")
    trees, least = (os.path.abspath(args.directory), os.getcwd()), {}
    for tree in trees:
        subprocess.check_call(["sh", "build_zipapp.sh"], cwd=tree, stdout=subprocess.DEVNULL)
    for _ in range(args.rounds):
        for tree in trees:
            found = subprocess.check_output([sys.executable, "-c", AGAINST, str(args.files)], cwd=tree,
                                            env=dict(os.environ, TMPDIR=IN_MEMORY or tempfile.gettempdir()))
            values = [float(word) for word in found.split()[-len(names):]]
            least[tree] = list(map(min, least.get(tree, values), values))
    print("%-22s %10s %10s %8s" % ("processor time", "before", "now", "ratio"))
    for name, before, now in zip(names, *(least[tree] for tree in trees)):
        print("%-22s %10.0f %10.0f %8.2f" % (name, before, now, now / before))


COMMANDS = {    # name: (function, what it measures, {option or argument: its default})
    "claims": (bench_claims, "what claims cost the server, from the first to the last",
               {"--hosts": 50, "--files": 200000, "--replicas": 2}),
    "transfer": (bench_transfer, "a first pass and a restore, over a plain rsync", {"--files": 20000, "--large": "1G"}),
    "idle": (bench_idle, "a pass with nothing to do", {"--files": 100000}),
    "restore": (bench_restore, "from three backups at once (--rate of each, bytes a second), over from one",
                {"--rate": "4M", "--size": "64M"}),
    "lock": (bench_lock, "how long a server holds its books up", {"--files": 1000000}),
    "against": (bench_against, "processor time, over that of another tree", {"directory": "", "--files": 20000, "--rounds": 2}),
}


def main():
    parser = argparse.ArgumentParser(description="Measurements of cbackup.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, words, options) in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        for option, default in options.items():
            command.add_argument(option, type=type(default), default=default)
        command.set_defaults(run=run)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
