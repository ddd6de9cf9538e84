"""Measurements that are not part of the tests; run from the project's top.

    python3 -m tests.bench claims [--hosts 50] [--files 200000] [--replicas 2]

`claims`: what a batch costs the server (milliseconds of CPU for the question what is missing, the claim, and the
confirmation) while the clients of many hosts fill their backups with many files, from the first batch to the last.
Every client claims in turn and keeps what it claimed until its next turn, as if all of them were copying.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time

import cbackup

CHECK = 64      # bytes of a made-up digest, in hex


class ClaimBench:
    """One server and the clients of `hosts` hosts, without a network and without files."""

    def __init__(self, base, hosts, files, replicas, seed=1):
        self.random = random.Random(seed)
        self.backups = ["b%d" % number for number in range(hosts)]
        sizes = [int(min(self.random.lognormvariate(0, 1.8), 2000) * (1 << 20)) for _ in range(files)]
        weights = [self.random.uniform(0.3, 1.5) for _ in self.backups]
        scale = 1.03 * replicas * sum(sizes) / sum(weights)
        self.capacity = {name: int(scale * weight) for name, weight in zip(self.backups, weights)}
        self.free = dict(self.capacity)
        config = cbackup.Config(
            text="", sources={"s": cbackup.Source("s", "s", "/nowhere", replicas)},
            backups={name: cbackup.Backup(name, "h" + name, "/nowhere/" + name, size=self.capacity[name])
                     for name in self.backups})
        self.service = cbackup.Service(cbackup.Home(base, "s"), config, "s")
        self.books = self.service.books
        self.books.random = random.Random(seed)
        self.books.db.execute("PRAGMA synchronous=OFF")
        row = self.books.source_row("s")
        with self.books.write():
            for number, size in enumerate(sizes):
                path = b"directory %03d/file %06d.jpg" % (number // 1000, number)
                self.books.add_entry(row, {"path": path, "kind": "f", "size": size, "mtime": 1, "mode": 0o644, "uid": 0,
                                           "gid": 0, "ino": 1, "ctime": 1, "nlink": 1, "target": None, "blocked": None}, 0)
        self.books.finish_scan("s", scanned=1.0)
        self.coming = dict.fromkeys(self.backups, ())
        for name in self.backups:
            self.ask(name, "demand", capacity=self.capacity[name], free=self.free[name])
        self.need = replicas * files
        self.done = 0

    def ask(self, backup, op, **fields):
        """(answer, milliseconds of CPU)"""
        begun = time.process_time()
        answer = self.service.handle(dict(fields, op=op, backup=backup))
        return answer, 1000 * (time.process_time() - begun)

    def turn(self, backup, most_files):
        """Confirm what was claimed, claim more. Returns (milliseconds for demand, claim, confirmation; files claimed)."""
        confirm = self.confirm(backup)
        _, demand = self.ask(backup, "demand", capacity=self.capacity[backup], free=self.free[backup])
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
        row, number = self.books.source_row("s"), self.books.backup_id(backup)
        facts = [self.books.version_of(row["id"], cbackup.as_raw(wanted[0])) for wanted in rows]
        self.books.record_check(number, row, [(fact["id"], fact["version"], b"d" * 32) for fact in facts])
        self.service.handle({"op": "placed", "backup": backup, "source": "s", "rows": [[r[0], r[6], 1] for r in rows]})
        self.done += len(rows)
        self.coming[backup] = ()
        return 1000 * (time.process_time() - begun)


def bench_claims(args):
    print("%d hosts, %s files, %d replicas" % (args.hosts, format(args.files, ","), args.replicas))
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    base = tempfile.mkdtemp(prefix="cbackup-bench-", dir=place)
    try:
        bench = ClaimBench(base, args.hosts, args.files, args.replicas)
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
        bench.books.close()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def measured(bench):
    """A line of medians: batches of 16 and of 1,000 by some clients. Batches that got less do not count."""
    found = []
    share = 100 * bench.done / bench.need
    groups = bench.books.one("SELECT COUNT(*) FROM groups WHERE files>0")[0]
    for most in (16, cbackup.BATCH_FILES):
        lines = []
        for name in bench.random.sample(bench.backups, 20):
            bench.confirm(name)
            demand, claim, _, count = bench.turn(name, most)
            if count:
                lines.append((demand, claim, bench.confirm(name) * most / count, count))
        middle = [sorted(column)[len(column) // 2] for column in zip(*lines)] or [0.0] * 4
        found += middle[:3]
    return "%5.1f%%  %9d" % (share, groups) + "".join("  %9.1f %9.1f %9.1f" % tuple(found[n:n + 3]) for n in (0, 3))


def main():
    parser = argparse.ArgumentParser(description="Measurements of cbackup.")
    commands = parser.add_subparsers(dest="command", required=True)
    claims = commands.add_parser("claims", help="what claims cost the server, from the first to the last")
    claims.add_argument("--hosts", type=int, default=50)
    claims.add_argument("--files", type=int, default=200000)
    claims.add_argument("--replicas", type=int, default=2)
    claims.set_defaults(run=bench_claims)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
