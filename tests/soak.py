"""A random history of all that can happen to a cluster, and after each quiet period: does everything still hold?

    python3 -m tests.soak --minutes 10 --seed 1

Files are written, deleted, renamed and become other things; clients run in any order and are killed at any point; servers
are killed and started; copies rot; state/ and databases are lost; whole backups are lost and replaced. From time to time all
is quiet: every host verifies and runs passes until nothing is left to do; then the sources, the backups and a restore are
compared from outside. Stops at the first violation, with the seed and the last steps of the history; the directories stay.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import stat
import sys
import time

from tests import faults
from tests.harness import Cluster, differences, digest_of, some_bytes, walk, write_file

STEPS = 12          # between two quiet periods
PERIODS = 4         # quiet periods of one history, each on what the ones before have left
ROUNDS = 8          # passes of every host until a quiet period must be settled


class Violation(AssertionError):
    pass


class History:
    """One cluster, and what is done to it by the dice of one seed."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.seed = seed
        self.lines = []
        self.count = 0
        self.periods = 0
        self.rotten = set()         # backups whose copies may not be what they were
        hosts = ["s", "a", "b", "c"]
        self.c = Cluster(*hosts, replicas=2, keep="2d")
        self.c.source("docs", "s", {"d%d/f%d" % (n % 5, n): self.dice.randrange(3000) for n in range(30)})
        self.c.source("more", "a", {"f%d" % n: self.dice.randrange(400000) for n in range(5)})
        for host in hosts:
            size = self.dice.choice(["6M", "20M", "20M"])
            self.c.backup("b" + host, host, size)
        self.note("sizes: %s" % {name: backup.options["size"] for name, backup in self.c.backups.items()})

    def note(self, line):
        self.lines.append(line)

    def fail(self, what):
        raise Violation("seed %s, after %d quiet periods: %s" % (self.seed, self.periods, what))

    # -- the whole --

    def run(self, deadline, periods=PERIODS):
        """False when the time was over before the history was."""
        self.c.start()
        self.quiet()
        for _ in range(periods):
            safe = self.safe_files()
            self.lose_a_host()
            for _ in range(STEPS):
                if time.monotonic() > deadline:
                    self.quiet()
                    return False
                step = self.dice.choice(self.STEPS)
                step(self)
                self.check_safe(safe)
            self.quiet()
        return True

    def settle_down(self):
        """Every server up; then passes until all of a round are settled. Mass changes are accepted."""
        down = [host for host in self.c.hosts if host not in self.c.servers]
        if down:
            self.c.start(*down)
        for turn in range(ROUNDS):
            if turn in (0, 1):
                for host in self.c.hosts:
                    if "b" + host in self.rotten:
                        self.c.run(host, "verify")
            results = [client.wait() for client in [self.c.spawn(host, "client", "--json") for host in self.c.hosts]]
            if turn and all(result.rc == 0 and result.json["settled"] for result in results):
                self.rotten.clear()
                return
            for name, facts in self.c.status().get("sources").items():
                if facts["state"] == "held":
                    self.note("accept %s" % name)
                    self.c.run("s", "accept", name)
        self.fail("not settled after %d rounds:\n%s\n%s" % (
            ROUNDS, "\n".join(map(str, results)), "\n".join(faults.violations(self.c)[:20])))

    def quiet(self):
        self.note("-- quiet --")
        self.settle_down()
        lines = faults.violations(self.c)
        if lines:
            self.fail("\n".join(lines[:30]))
        self.check_idle()
        self.check_restore()
        self.periods += 1

    def check_idle(self):
        """When nothing changes, nothing is written."""
        host = self.dice.choice(self.c.hosts)
        before = {name: self.c.kept_inodes(name) for name in self.c.backups}
        result = self.c.client(host)
        figures = dict(result.json)
        if result.rc != 0 or not figures.pop("settled") or any(figures.values()):
            self.fail("an idle pass did something: %s" % result)
        after = {name: self.c.kept_inodes(name) for name in self.c.backups}
        if before != after:
            self.fail("an idle pass on %s touched files" % host)

    def check_restore(self):
        source = self.dice.choice(list(self.c.sources.values()))
        asker = self.dice.choice([host for host in self.c.hosts if host != source.host])
        target = self.c.path("restored")
        result = self.c.restore(asker, source.name, to=target)
        lines = differences(source.path, target, ignore=("dir.mtime_ns",))
        if result.rc != 0 or lines:
            self.fail("a restore of %s on %s differs: %s\n%s" % (source.name, asker, result, "\n".join(lines[:20])))
        shutil.rmtree(target)

    # -- files that nothing happened to --

    def safe_files(self):
        """{(source, path): digest} of what has all its copies now."""
        return {(source, name): digest_of(os.path.join(self.c.sources[source].path, name))
                for source in self.c.sources for name, hosts in faults.holders(self.c, source).items() if len(hosts) >= 2}

    def check_safe(self, safe):
        """A file that was on N hosts and that nobody touched is on N hosts, but for those that rotted or were lost."""
        if self.rotten:
            return
        for source in self.c.sources:
            there = faults.holders(self.c, source)
            for (name_of, name), digest in list(safe.items()):
                if name_of != source:
                    continue
                path = os.path.join(self.c.sources[source].path, name)
                if name not in there or digest_of(path) != digest:
                    del safe[(name_of, name)]       # its own history has gone on
                elif len(there[name]) < 2:
                    if source in self.swapped and name in self.swapped[source]:
                        continue
                    self.fail("%s/%s was on two hosts and is on %s now" % (source, name, sorted(there[name])))

    swapped = {}

    # -- steps: what people do --

    def files_of(self, source, kinds=(stat.S_ISREG,)):
        return [relative for relative, _, info in walk(source.path) if any(kind(info.st_mode) for kind in kinds)]

    def pick(self):
        return self.dice.choice(list(self.c.sources.values()))

    def new_name(self):
        self.count += 1
        return self.dice.choice(["", "d%d/" % self.dice.randrange(6), "deep/er/"]) + "n%d" % self.count

    def place(self, source, name):
        """The full path of a new name, or None where a file is in the way of its directories."""
        path = os.path.join(source.path, name)
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return path
        return None

    def write(self):
        source = self.pick()
        for _ in range(self.dice.randrange(1, 6)):
            old = self.files_of(source)
            name = self.dice.choice(old) if old and self.dice.random() < 0.5 else self.new_name()
            path = self.place(source, name)
            if path and not os.path.isdir(path) and not os.path.islink(path):
                self.count += 1
                write_file(path, some_bytes(self.dice.choice([0, 1, 500, 5000, 300000]), self.count))
                self.note("write %s/%s" % (source.name, name))

    def append(self):
        source = self.pick()
        for name in self.dice.sample(self.files_of(source), min(2, len(self.files_of(source)))):
            with open(os.path.join(source.path, name), "ab") as file:
                file.write(b"more %d" % self.count)
            self.note("append %s/%s" % (source.name, name))

    def delete(self):
        source = self.pick()
        names = self.files_of(source, (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR))
        if not names:
            return
        name = self.dice.choice(names)
        path = os.path.join(source.path, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        self.note("delete %s/%s" % (source.name, name))

    def rename(self):
        source = self.pick()
        names = self.files_of(source, (stat.S_ISREG, stat.S_ISDIR))
        if not names:
            return
        old = self.dice.choice(names)
        onto = self.files_of(source)
        new = self.dice.choice(onto) if onto and self.dice.random() < 0.3 else self.new_name()
        path = self.place(source, new)
        if path and not (new + "/").startswith(old + "/"):
            with contextlib.suppress(OSError):
                os.rename(os.path.join(source.path, old), path)
                self.note("rename %s: %s -> %s" % (source.name, old, new))

    def swap(self):
        source = self.pick()
        names = self.files_of(source)
        if len(names) > 1:
            one, two = (os.path.join(source.path, name) for name in self.dice.sample(names, 2))
            os.rename(one, one + ".t")
            os.rename(two, one)
            os.rename(one + ".t", two)
            self.note("swap %s: %s <-> %s" % (source.name, os.path.relpath(one, source.path), os.path.relpath(two, source.path)))

    def mode(self):
        source = self.pick()
        for name in self.dice.sample(self.files_of(source, (stat.S_ISREG, stat.S_ISDIR)), 1) if self.files_of(source) else ():
            path = os.path.join(source.path, name)
            os.chmod(path, self.dice.choice([0o700, 0o755, 0o711]) if os.path.isdir(path) else self.dice.choice([0o600, 0o644, 0o755]))
            self.note("chmod %s/%s" % (source.name, name))

    def kind(self):
        """A path becomes something else."""
        source = self.pick()
        names = self.files_of(source, (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR))
        if not names:
            return
        name = self.dice.choice(names)
        path = os.path.join(source.path, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        self.count += 1
        kind = self.dice.choice(["file", "link", "directory", "tree"])
        if kind == "file":
            write_file(path, "a file %d" % self.count)
        elif kind == "link":
            os.symlink(self.dice.choice(["nowhere", "..", "/etc"]), path)
        else:
            os.mkdir(path)
            if kind == "tree":
                write_file(os.path.join(path, "below"), "below %d" % self.count)
                os.symlink("below", os.path.join(path, "link"))
        self.note("%s/%s becomes a %s" % (source.name, name, kind))

    def link(self):
        source = self.pick()
        names = self.files_of(source)
        path = names and self.place(source, self.new_name())
        if path:
            with contextlib.suppress(OSError):
                os.link(os.path.join(source.path, self.dice.choice(names)), path)
                self.note("hard link %s" % path)

    # -- steps: what machines do --

    def client(self):
        host = self.dice.choice(self.c.hosts)
        self.c.client(host)
        self.note("client %s" % host)

    def clients(self):
        hosts = self.dice.sample(self.c.hosts, 2)
        for client in [self.c.spawn(host, "client", "--json") for host in hosts]:
            client.wait()
        self.note("clients %s at once" % hosts)

    def killed_client(self):
        host, count = self.dice.choice(self.c.hosts), self.dice.choice([1, 1, 2, 3, 4, 5, 6, 8, 10, 15])
        result = self.c.client(host, CBACKUP_TEST_KILL="any:%d" % count)
        self.note("client %s killed at any:%d: %s" % (host, count, result.rc == -signal.SIGKILL))

    def client_killed_by_the_clock(self):
        host, seconds = self.dice.choice(self.c.hosts), self.dice.random() * 0.6
        client = self.c.spawn(host, "client")
        with contextlib.suppress(Exception):
            client.popen.wait(seconds)
        client.kill()
        self.note("client %s killed after %.2f s" % (host, seconds))

    def server_dies_below_a_client(self):
        host = self.dice.choice(["s", "a"])
        if host not in self.c.servers:
            return
        clients = [self.c.spawn(one, "client", "--json") for one in "bc"]
        with contextlib.suppress(Exception):
            clients[0].popen.wait(self.dice.random() * 0.5)
        self.c.kill(host)
        for client in clients:
            client.wait()
        self.note("server %s killed while b and c were at work" % host)

    def server(self):
        host = self.dice.choice(self.c.hosts)
        if host in self.c.servers:
            self.c.kill(host) if self.dice.random() < 0.5 else self.c.stop(host)
            self.note("server %s down" % host)
        else:
            self.c.start(host)
            self.note("server %s up" % host)

    def state(self):
        host = self.dice.choice(self.c.hosts)
        faults.lose_state(self.c, host)
        self.note("state of %s lost" % host)

    def database(self):
        name = self.dice.choice(list(self.c.backups))
        path = os.path.join(self.c.backups[name].path, ".cbackup", "backup.db")
        if os.path.exists(path):
            kind = self.dice.choice(["gone", "garbage"])
            os.unlink(path) if kind == "gone" else write_file(path, some_bytes(20000, self.count))
            self.note("database of %s: %s" % (name, kind))

    def rot(self):
        name = self.dice.choice(list(self.c.backups))
        root = self.c.backups[name].path
        found = [relative for source in self.c.sources for relative in
                 (os.path.join(source, one) for one, info in faults.regular_files(root, source).items() if info.st_size)]
        for relative in self.dice.sample(found, min(2, len(found))):
            path = os.path.join(root, relative)
            info = os.stat(path)
            with open(path, "r+b") as file:
                file.seek(self.dice.randrange(info.st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 255]))
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
            self.rotten.add(name)
            self.note("rot in %s/%s" % (name, relative))

    def by_hand(self):
        name = self.dice.choice(list(self.c.backups))
        root = self.c.backups[name].path
        found = [os.path.join(source, one) for source in self.c.sources for one in faults.regular_files(root, source)]
        if found:
            relative = self.dice.choice(found)
            os.unlink(os.path.join(root, relative))
            self.rotten.add(name)
            self.note("deleted by hand: %s/%s" % (name, relative))

    def time_goes_by(self):
        hours = self.dice.choice([1, 6, 24, 60])
        self.c.advance(hours * 3600)
        self.note("%d hours later" % hours)

    def lose_a_host(self):
        """Right after a quiet period: the host's disks are new. Another one of N is left for every file."""
        if self.dice.random() < 0.3:
            host = self.dice.choice(["b", "c"])
            faults.lose_state(self.c, host)
            name = "b" + host
            shutil.rmtree(self.c.backups[name].path)
            os.mkdir(self.c.backups[name].path)
            self.rotten.add(name)
            self.c.client(host, "--adopt", name)
            self.note("host %s lost and replaced" % host)

    STEPS = [write, write, write, append, delete, rename, rename, swap, mode, kind, link, client, client, client, clients,
             killed_client, killed_client, killed_client, killed_client, client_killed_by_the_clock, server, server,
             server_dies_below_a_client, state, database, rot, by_hand, time_goes_by]


def run(seed, deadline, out=sys.stdout, periods=PERIODS):
    """One history; raises Violation (or what else went wrong), the history's tail printed. Returns its quiet periods."""
    history = History(seed)
    try:
        with history.c:
            history.run(deadline, periods)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            print("seed %s\n... %s\n%s" % (seed, "\n    ".join(history.lines[-60:]), error), file=out, flush=True)
        raise
    return history.periods


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first history; the next ones count up")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10 ** 6)
    deadline = time.monotonic() + 60 * args.minutes
    histories = periods = 0
    while time.monotonic() < deadline:
        print("history with seed %d" % seed, flush=True)
        try:
            periods += run(seed, deadline)
        except KeyboardInterrupt:
            return 130
        except AssertionError:
            return 1
        histories, seed = histories + 1, seed + 1
    print("%d histories, %d quiet periods: everything holds" % (histories, periods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
