"""The rules of placing, tried in one process: many clusters, many orders, hundreds of files each, no file contents.

What decides is the real thing: a `Service` with real books on SQLite for each host with sources, a real `Pass` with a
real `Vault` for each backup. Only the bytes are not moved: `TrialPass` replaces `fetch` by the time that the transfer
would take, in simulated time, and confirms with a made-up digest; links call `Service.handle` directly. Passes overlap:
each runs in a thread of its own, exactly one at a time, and lets the others go on while its transfer lasts. With the
same seed everything happens again in the same way.

    python3 -m tests.placement [--seeds 16] [--first 1] [--scenario NAME ...] [--real]

prints a table: by how much the room is above the least that is feasible, at the end and for the seed with the least; how
many of the seeds settled; the rounds until nothing moved any more (in a round every live backup makes one pass); the waste
(bytes copied over the bytes that were missing, less one; median and worst); how many seeds copied or dropped anything in
ten further rounds; and, where there is less room than needed, the share of the room that is in use and the useless bytes
(second copies in a source while a file that would fit has none). `--real`: the same scenarios with real clients and
servers, see tests.placement_real.
"""

import argparse
import contextlib
import heapq
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
from unittest import mock

import cbackup
from tests import IN_MEMORY

GB = 1 << 30
HOUR = 3600.0


class TrialClock:
    """The program's clock, set by the scheduler."""

    def __init__(self):
        self.time = 1e9

    def now(self):
        return self.time

    steady = now

    @staticmethod
    def nap(seconds):
        return seconds


class DirectLink:
    """A link that is a call, and that looks at the claims which come back."""

    level = cbackup.LEVEL

    def __init__(self, world, host):
        self.world, self.service = world, world.services[host]

    def peer_level(self):
        return self.level

    def done(self):
        pass

    def call(self, op, **fields):
        answer = self.service.handle(dict(fields, op=op))
        if op == "claim" and answer["rows"]:
            self.world.useless += self.useless(fields["backup"], fields["source"], fields["free"], answer["rows"])
        return answer

    def useless(self, backup, source, free, rows):
        """Bytes of these claims that are second copies while a file that would have fit in their place has none."""
        books = self.service.books
        row = books.source_row(source)
        marks = ",".join("?" * len(rows))
        second = books.one("SELECT COALESCE(SUM(e.size), 0) FROM entries e JOIN groups g ON g.id=e.grp WHERE e.source=? "
                           "AND g.n>1 AND e.path IN (%s)" % marks, row["id"], *[cbackup.as_raw(row[0]) for row in rows])[0]
        if not second:
            return 0
        room = free - sum(size for _, size, *_ in rows) + second
        bare = books.one("SELECT MIN(e.size) FROM entries e JOIN groups g ON g.id=e.grp WHERE e.source=? AND g.n=0 "
                         "AND NOT EXISTS(SELECT 1 FROM declines d WHERE d.file=e.id AND d.backup=?)",
                         row["id"], books.backup_id(backup))[0]
        return second if bare is not None and bare <= room else 0

    def again(self):
        return self

    def close(self):
        pass


class LatePipeline:
    """A batch is checked when the next one has been copied, or at the end: the most that the real one may lag."""

    def __init__(self):
        self.work = None

    def submit(self, work):
        self.drain()
        self.work = work

    def drain(self):
        work, self.work = self.work, None
        if work:
            work()


class TrialPass(cbackup.Pass):
    """A pass that copies nothing, but takes the time for it."""

    def __init__(self, world, vault, wait):
        links = {host: DirectLink(world, host) for host in world.services if host != vault.spec.host}
        own = DirectLink(world, vault.spec.host) if vault.spec.host in world.services else None
        super().__init__(vault, world.config, vault.spec.host, links, cbackup.Figures(), mover=object(), own=own)
        self.world, self.wait, self.pipeline = world, wait, LatePipeline()

    def fetch(self, standing, files, updating=False):
        vault = self.vault
        vault.make_room(sum(f.size for f in files))
        files = self._that_fit(standing, files, updating, vault.capacity() - vault.used())
        if not files:
            return
        vault.expect(standing.name, standing.books, files)
        size = sum(f.size for f in files)
        assert vault.used() <= vault.capacity(), "%s would hold more than its size" % self.name
        seconds = 0.2 + size / self.world.rates[self.host]
        while seconds > cbackup.RENEW_EVERY:
            self.wait(cbackup.RENEW_EVERY)
            self.renew(self.links)
            seconds -= cbackup.RENEW_EVERY
        self.wait(seconds)
        self.pipeline.submit(lambda: self.guarded(standing, lambda s: self.check(s, files, None, updating)))

    def check(self, standing, files, outcome, updating):
        books, row = self.world.books_of(standing.name)
        found = [(f, books.version_of(row["id"], f.path)) for f in files]
        good = [f for f, facts in found if facts and facts["version"] == f.version]
        self._count_in(standing, self.check_links[standing.host], self.world.compared(self.vault, standing.name, good))
        self.figures.add(copied_files=len(good), copied_bytes=sum(f.size for f in good))
        changed = [(f, "changed") for f, facts in found if not facts or facts["version"] != f.version]
        if changed:
            self.decline(standing, self.check_links[standing.host], changed, failed=False)

    def fetch_catalog(self, standing):
        pass  # a matter of bytes, not of decisions

    def scrub(self):
        pass  # there is nothing to read


def digest_for(f):
    return cbackup.hashlib.blake2b(f.path, digest_size=32).digest()


class Strand(threading.Thread):
    """A pass that runs only when the scheduler says so."""

    def __init__(self, world, spec):
        super().__init__(daemon=True)
        self.world, self.spec = world, spec
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.due, self.over, self.error, self.figures = 0.0, False, None, None

    def wait(self, seconds):
        self.due = self.world.clock.time + seconds
        self.back.release()
        self.go.acquire()

    def resume(self):
        """Let it run until it waits or ends."""
        if not self.is_alive():
            self.start()
        self.go.release()
        self.back.acquire()
        if self.error:
            raise self.error

    def run(self):
        self.go.acquire()
        try:
            one = TrialPass(self.world, self.world.vaults[self.spec.name], self.wait)
            self.figures = one.figures
            one.run()
        except BaseException as error:
            self.error = error
        self.over = True
        self.back.release()


class World:
    """What a scenario acts on: a cluster in which rounds of passes go by, and the count of what they do.

    Sizes are those of the simulation, however large the files really are. `TrialWorld` is a cluster in this process,
    `tests.placement_real.RealWorld` one of real clients and servers. Theirs are begin, add_files, delete_files, plant,
    room and used (bytes of a backup), wait (seconds), round, groups and spare.
    """

    settled = False     # whether all clients of the last round said that nothing is left to do

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.sources, self.backups = {}, {}
        self.config, self.down, self.rare = cbackup.Config(text=""), set(), {}
        self.copied = self.dropped = self.needed = self.rounds = self.useless = 0
        self.serial = itertools.count()

    def source(self, name, host, replicas):
        self.sources[name] = cbackup.Source(name, host, "/nowhere/" + name, replicas)

    def backup(self, name, host, size):
        self.backups[name] = cbackup.Backup(name, host, self.place_of(name), size=int(size))

    def rooms(self):
        """host -> bytes that its backups offer, of the backups that are up."""
        rooms = {}
        for name, spec in self.backups.items():
            if name not in self.down:
                rooms[spec.host] = rooms.get(spec.host, 0) + self.room(name)
        return rooms

    def free(self):
        """backup -> bytes, negative where it is over its size."""
        return {name: self.room(name) - self.used(name) for name in self.backups}

    def slack(self):
        """By which share the room is above the least that is feasible for the files there are; negative: it is below."""
        wanted = [(source.host, source.replicas, sum(group.bytes for group in self.groups(name)))
                  for name, source in self.sources.items()]
        rooms = self.rooms()
        least = scaled(wanted, rooms, 0)
        return sum(rooms.values()) / sum(least.values()) - 1 if least else -1.0

    def least(self):
        """Bytes that have to be copied from here on, whatever the rules: what is missing, and what has to move for it."""
        groups = [(source.host, source.replicas, group.bytes, group.copy_hosts)
                  for name, source in self.sources.items() for group in self.groups(name)]
        return least_cost(groups, self.rooms())[1]

    def settle(self, limit=30, quiet=2, count=True):
        """Rounds until `quiet` rounds in a row did nothing. Returns the number of the last one in which something was."""
        if count:
            self.needed += self.least()
        last = still = 0
        for number in range(1, limit + 1):
            if self.round():
                last, still = number, 0
            else:
                still += 1
            if still >= quiet or self.settled:
                break
        self.rounds = max(self.rounds, last)
        return last

    def used_share(self):
        """The share of the room in use, of hosts that could use it."""
        return sum(map(self.used, self.backups)) / sum(map(self.room, self.backups))

    def missing(self):
        """Bytes of copies that are missing."""
        return sum(max(0, source.replicas - len(group.copy_hosts)) * group.bytes
                   for name, source in self.sources.items() for group in self.groups(name))

    def useless_share(self):
        """Bytes of second copies made while a file of the source that would have fit had none, per byte of the sources."""
        return self.useless / sum(group.bytes for name in self.sources for group in self.groups(name))


class TrialWorld(World):
    """A cluster in this process, in simulated time."""

    names = b"f%06d"        # of files

    def __init__(self, seed, directory):
        super().__init__(seed)
        self.base, self.clock, self.rates = directory, TrialClock(), {}
        self.services, self.vaults = {}, {}

    # -- the cluster

    def place_of(self, backup):
        return os.path.join(self.base, backup)

    def begin(self):
        """Take over what was added or changed since the last time, as a changed configuration would."""
        self.config = cbackup.Config(text="", sources=dict(self.sources), backups=dict(self.backups))
        for host in sorted({source.host for source in self.sources.values()}):
            if host not in self.services:
                os.makedirs(os.path.join(self.base, "home-" + host))
                home = cbackup.Home(os.path.join(self.base, "home-" + host), host)
                service = cbackup.Service(home, self.config, host)
                service.books.random = random.Random(self.random.random())
                service.books.db.execute("PRAGMA synchronous=OFF")
                self.services[host] = service
            self.services[host].reload(self.config)
        for name, spec in self.backups.items():
            self.rates.setdefault(spec.host, self.random.uniform(20e6, 100e6))
            if name not in self.vaults:
                self.vaults[name] = cbackup.Vault(spec, "test")
                self.vaults[name].db.execute("PRAGMA synchronous=OFF")
                self.vaults[name].set_meta("complete", 1)
            self.vaults[name].spec = spec

    def close(self):
        for service in self.services.values():
            service.books.close()
        for vault in self.vaults.values():
            vault.close()

    def room(self, backup):
        return self.vaults[backup].capacity()

    def used(self, backup):
        return self.vaults[backup].used()

    def books_of(self, source):
        books = self.services[self.sources[source].host].books
        return books, books.source_row(source)

    def add_files(self, source, sizes):
        """New files, as if a scan had found them. Returns their paths."""
        books, row = self.books_of(source)
        paths = [self.names % next(self.serial) for _ in sizes]
        with books.write():
            books.add_entries(row, [({
                "path": path, "kind": "f", "size": int(size), "mtime": 1, "mode": 0o644, "uid": 0, "gid": 0, "ino": 1,
                "ctime": 1, "nlink": 1, "target": None, "blocked": None, "xattrs": None}, 0)
                for path, size in zip(paths, sizes)])
        books.finish_scan(source, scanned=self.clock.time)
        return paths

    def delete_files(self, source, paths):
        books, row = self.books_of(source)
        with books.write():
            for path in paths:
                books.bury(row, books.version_of(row["id"], path)["id"], path, "f")

    def compared(self, vault, source, files):
        """A backup's copies are true, and may be placed. Returns [(path, version, tag)] of them, to be counted."""
        books, row = self.books_of(source)
        facts = books.versions_of(row["id"], [f.path for f in files])
        books.record_check(books.backup_id(vault.spec.name), row, [
            (facts[f.path]["id"], f.version, digest_for(f)) for f in files])
        books.prove_all(row, [(facts[f.path], digest_for(f), False) for f in files])
        vault.plan_places(source, [(f.path, digest_for(f)) for f in files])
        return [(f.path, f.version, cbackup.tag_of(f.path, f.size, f.mtime, digest_for(f))) for f in files]

    def plant(self, backup, source, paths):
        """Copies that are there already, confirmed."""
        books, row = self.books_of(source)
        vault = self.vaults[backup]
        number = books.hear(backup, {"capacity": vault.capacity(), "free": vault.free()})
        files = [cbackup.Wanted(*books.one("SELECT %s FROM entries e WHERE source=? AND path=?" % books.WANTED, row["id"], path))
                 for path in paths]
        with books.write(), vault.write():
            vault.expect(source, books.id, files)
            books.count_copies(number, row["id"], self.compared(vault, source, files))
            vault.arrived(source, paths)

    # -- time goes by

    def wait(self, seconds):
        self.clock.time += seconds
        for service in self.services.values():
            service.books.expire(self.config.lost_after)

    def round(self):
        """One pass of every backup that is up, overlapping. Returns whether anything was copied or dropped."""
        begun, copied, dropped = self.clock.time, self.copied, self.dropped
        queue = []
        for name, spec in sorted(self.backups.items()):
            if name not in self.down and self.random.random() < self.rare.get(name, 1.0):
                strand = Strand(self, spec)
                strand.due = begun + self.random.random() * HOUR / 2
                heapq.heappush(queue, (strand.due, self.random.random(), strand))
        strands = [item[2] for item in queue]
        while queue:
            due, _, strand = heapq.heappop(queue)
            self.clock.time = max(self.clock.time, due)
            strand.resume()
            if not strand.over:
                heapq.heappush(queue, (strand.due, self.random.random(), strand))
        for strand in strands:
            counts = strand.figures.counts
            self.copied += counts["copied_bytes"]
            self.dropped += counts["dropped_bytes"]
            assert not strand.figures.lines, strand.figures.lines
        self.clock.time = max(self.clock.time, begun + HOUR)
        return (self.copied, self.dropped) != (copied, dropped)

    def groups(self, source):
        books, row = self.books_of(source)
        return books.groups(row["id"])

    def spare(self):
        """backup -> bytes of its copies of overserved files."""
        spare = {}
        for service in self.services.values():
            for words in service.books.last_words():
                spare[words["name"]] = spare.get(words["name"], 0) + words["droppable"]
        return spare


class Outcome:
    """What one run came to."""

    def __init__(self, world, further):
        self.missing = world.missing()
        self.settled = self.missing == 0
        self.rounds = world.rounds
        self.waste = world.copied / world.needed - 1 if world.needed else 0.0
        self.used = world.used_share()
        self.useless = world.useless_share()
        self.slack = world.slack()
        copied, dropped = world.copied, world.dropped
        for _ in range(further):
            world.round()
        self.churn = world.copied - copied + world.dropped - dropped


# ---- sizes and capacities ---------------------------------------------------------------------------------------

def lognormal(rng, count):
    """Sizes around 1 GB, sigma 1.8, with 1 % of huge files, up to about 1 % of the whole."""
    sizes = [min(rng.lognormvariate(0, 1.8), 40.0) for _ in range(count)]
    total = sum(sizes)
    for number in rng.sample(range(count), max(1, count // 100)):
        sizes[number] = total * rng.uniform(0.005, 0.01)
    return [max(1, int(size * GB)) for size in sizes]


def least_cost(groups, rooms):
    """(bytes placed, bytes of them that are copied) when as many copies as possible are placed, as few as possible of them
    new, as if files could be divided: what no rules can beat.

    groups: (own host, replicas, bytes, hosts that have a copy); rooms: host -> bytes.  A flow: from 0 to each group, from
    there to each host at most the group's bytes, from the hosts to 1; the cheapest paths are filled first.
    """
    node = {host: number for number, host in enumerate(sorted(rooms), 2)}
    arcs, out = [], {}

    def arc(tail, head, capacity, cost):
        out.setdefault(tail, []).append(len(arcs))
        arcs.append([head, capacity, cost])
        out.setdefault(head, []).append(len(arcs))
        arcs.append([tail, 0, -cost])

    for number, (own, replicas, size, present) in enumerate(groups, 2 + len(rooms)):
        arc(0, number, replicas * size, 0)
        for host in sorted(rooms):
            if host != own:
                arc(number, node[host], size, 0 if host in present else 1)
    for host in sorted(rooms):
        arc(node[host], 1, max(0, int(rooms[host])), 0)
    placed = copied = 0
    while True:
        best, queue = {0: (0, None)}, [0]
        for tail in queue:
            for number in out.get(tail, ()):
                head, capacity, cost = arcs[number]
                if capacity > 0 and (head not in best or best[tail][0] + cost < best[head][0]):
                    best[head] = best[tail][0] + cost, number
                    queue.append(head)
        if 1 not in best:
            return placed, copied
        path, at = [], 1
        while at != 0:
            path.append(best[at][1])
            at = arcs[path[-1] ^ 1][0]
        amount = min(arcs[number][1] for number in path)
        for number in path:
            arcs[number][1] -= amount
            arcs[number ^ 1][1] += amount
        placed, copied = placed + amount, copied + amount * best[1][0]


def feasible(sources, rooms):
    """Whether all copies fit when files could be divided. sources: (host, replicas, bytes)."""
    placed, _ = least_cost([source + ((),) for source in sources], rooms)
    return placed == sum(replicas * size for _, replicas, size in sources)


def scaled(sources, weights, slack):
    """host -> bytes: capacities in the proportion of `weights`, `slack` above the least that is feasible."""
    low, high = 0.0, 100.0 * sum(replicas * size for _, replicas, size in sources) / min(weights.values())
    for _ in range(50):
        middle = (low + high) / 2
        if feasible(sources, {host: int(middle * weight) for host, weight in weights.items()}):
            high = middle
        else:
            low = middle
    return {host: int(high * (1 + slack) * weight) + 1 for host, weight in weights.items()}


# ---- the scenarios ----------------------------------------------------------------------------------------------

FILES = 240
"""Files of a source, where a scenario does not say otherwise."""


def hosts(*weights):
    return {"h%d" % number: weight for number, weight in enumerate(weights)}


def make(world, weights, slack, *sources, files=None):
    """Backups with `weights` and `slack`, and sources (host, replicas[, sizes]); settles nothing yet."""
    facts = [(host, replicas, *(sizes or [lognormal(world.random, files or FILES)])) for host, replicas, *sizes in sources]
    for number, (host, replicas, _) in enumerate(facts):
        world.source("s%d" % number, host, replicas)
    rooms = scaled([(host, replicas, sum(sizes)) for host, replicas, sizes in facts], weights, slack)
    for host, room in rooms.items():
        world.backup("b" + host[1:], host, room)
    world.begin()
    for number, (_, _, sizes) in enumerate(facts):
        world.add_files("s%d" % number, sizes)
    return facts


def spread(weights, slack, *replicas, files=None, equal=False):
    """Sources with so many replicas: one on a host of its own, several on the first hosts, which have backups too. Negative
    `slack`: there is less room than needed."""
    def scenario(world):
        owners = ["s"] if len(replicas) == 1 else sorted(hosts(*weights))
        count = files or FILES // min(2, len(replicas))
        sizes = [[GB] * count if equal else lognormal(world.random, count) for _ in replicas]
        make(world, hosts(*weights), slack, *zip(owners, replicas, sizes))
        world.settle()
    return scenario


def packed(world, sizes, rooms, replicas=2):
    """A source on a host of its own, and backups with these rooms on a host each; nothing settles yet. Returns paths."""
    world.source("s0", "s", replicas)
    for number, room in enumerate(rooms):
        world.backup("b%d" % number, "h%d" % number, room)
    world.begin()
    return world.add_files("s0", sizes)


def seed(world):
    packed(world, [GB] * 10, [7 * GB] * 3)
    world.settle()


def trap(world):
    paths = packed(world, [GB] * 10, [7 * GB] * 3)
    for name, planted in (("b0", paths[:7]), ("b1", paths[:7]), ("b2", paths[7:])):
        world.plant(name, "s0", planted)
    world.settle()


def frag(world):
    """Packed full with large and small files; then one more large file, for which small ones must move together."""
    paths = packed(world, [10 * GB] * 20 + [GB] * 50, [1050 * GB // 10] * 5)
    loads = pack(world.random, list(zip(paths, [10] * 20 + [1] * 50)), [100] * 5, 2)
    for number, planted in enumerate(loads):
        world.plant("b%d" % number, "s0", planted)
    world.add_files("s0", [10 * GB])
    world.needed = 30 * GB  # two copies, and on both hosts 5 of small files have to go elsewhere first
    assert world.least() == 20 * GB
    world.settle(count=False)


def pack(rng, files, rooms, replicas):
    """Each (path, size) into `replicas` of the rooms, the largest first, into those with the most room."""
    while True:
        left, loads = list(rooms), [[] for _ in rooms]
        for path, size in sorted(files, key=lambda f: (-f[1], rng.random())):
            chosen = sorted(range(len(rooms)), key=lambda n: (-left[n], rng.random()))[:replicas]
            for number in chosen:
                left[number] -= size
                loads[number].append(path)
        if min(left) >= 0:
            return loads


def frag2(share):
    """Full with 3 % left; then a file of `share` of the bytes for which there is room."""
    def scenario(world):
        make(world, hosts(1, 1, 1, 1, 1, 1), 0.03, ("s", 2))
        world.settle()
        world.copied = world.dropped = world.needed = 0
        free = world.free()
        size = int(share * sum(free.values()) / 2)
        spare = world.spare()
        world.add_files("s0", [size])
        rooms = sorted(free[name] + spare.get(name, 0) for name in free)
        world.needed = 2 * size + sum(max(0, size - room) for room in rooms[-2:])  # it does not go in parts
        world.settle(count=False)
    return scenario


def bigfiles(slack):
    """40 files of 50 to 150 GB; rooms that just take a planted packing, and one largest file more (or 3 %)."""
    def scenario(world):
        sizes = [int(world.random.uniform(50, 150) * GB) for _ in range(40)]
        weights = [1.0, 0.8, 0.6, 0.4, 0.3]
        loads = [0] * 5
        for size in sizes:
            chosen = sorted(range(5), key=lambda n: world.random.random() ** (1 / weights[n]))[-2:]
            for number in chosen:
                loads[number] += size
        packed(world, sizes, [load * (1 + slack) if slack else load + max(sizes) for load in loads])
        world.settle()
    return scenario


def twoloc(world):
    """A host with two backups counts once."""
    sizes = lognormal(world.random, FILES)
    total = sum(sizes)
    world.source("s0", "s", 2)
    for name, host, room in (("b0", "h0", .52), ("b1", "h0", .52), ("b2", "h1", .55), ("b3", "h2", .55)):
        world.backup(name, host, room * total)
    world.begin()
    world.add_files("s0", sizes)
    world.settle()


def pair(world):
    """Two hosts that are each other's backup; then more copies are wanted than there are hosts."""
    make(world, hosts(1, 1), 0.05, ("h0", 1), ("h1", 1), files=60)
    world.settle()
    for name in ("s0", "s1"):
        world.sources[name] = world.sources[name]._replace(replicas=2)
    world.begin()
    world.settle(count=False)


def growth(world):
    """5 % new and 2 % deleted, twelve times, down to 5 % of slack."""
    there = dict(enumerate(lognormal(world.random, FILES)))
    first, steps, peak = dict(there), [], sum(there.values())
    for number in range(1, 13):
        gone = world.random.sample(list(there), len(there) // 50)
        new = dict(enumerate(lognormal(world.random, FILES // 20), 1000 * number))
        there = {key: size for key, size in {**there, **new}.items() if key not in gone}
        steps.append((gone, new))
        peak = max(peak, sum(there.values()))
    rooms = scaled([("s", 2, peak)], hosts(1, .8, .6, .5, .4), 0.05)
    paths = dict(zip(first, packed(world, first.values(), rooms.values())))
    world.settle()
    for gone, new in steps:
        world.delete_files("s0", [paths[key] for key in gone])
        paths.update(zip(new, world.add_files("s0", new.values())))
        world.settle()


def death(world):
    """One of six hosts dies and is given up; with 5 % left the others do without; it returns; 12 % more bytes."""
    facts = make(world, hosts(1, 1, 1, .8, .8), 0.05, ("s", 2))
    world.backup("b5", "h5", world.backups["b0"].size)
    world.begin()
    world.settle()
    world.down.add("b5")
    world.wait(world.config.lost_after / 2)
    world.round()
    world.wait(world.config.lost_after / 2 + HOUR)
    world.settle()
    world.down.clear()
    world.settle()
    old, new = facts[0][2], lognormal(world.random, len(facts[0][2]) * 12 // 100)
    # So many files of such different sizes may be anything from 7 to 30 % of the bytes: more than there is room for.
    world.add_files("s0", [size * 0.12 * sum(old) / sum(new) for size in new])
    world.settle()


def join(world):
    """Too little room, and still; then an empty host comes."""
    sizes = lognormal(world.random, FILES)
    packed(world, sizes, [share * sum(sizes) for share in (.5, .45, .4, .35)])
    world.settle()
    assert world.used_share() >= 0.97, "%.3f of too little room is in use" % world.used_share()
    world.copied = world.needed = 0
    world.backup("b4", "h4", .36 * sum(sizes))
    world.begin()
    world.settle()


def shrink(world):
    """One of five hosts has only 60 % of its room any more; 5 % are left."""
    facts = make(world, hosts(1, 1, 1, 1, .6), 0.05, ("s", 2))
    small = world.backups["b4"]
    world.backups["b4"] = small._replace(size=world.backups["b0"].size)
    world.begin()
    world.settle()
    assert facts
    world.backups["b4"] = small
    world.begin()
    world.copied = world.needed = 0
    world.settle()


def identical(world):
    """Three hosts with the same 60 %, and an empty one."""
    sizes = lognormal(world.random, FILES)
    paths, _ = share_of(0.6, sizes, packed(world, sizes, [sum(sizes) * 3 / 4 * 1.03] * 4, replicas=3))
    for number in range(3):
        world.plant("b%d" % number, "s0", paths)
    world.settle()


def share_of(share, sizes, paths):
    """Paths of at most this share of the bytes, and those of the others."""
    chosen, rest, total = [], [], 0
    for path, size in zip(paths, sizes):
        fits = total + size <= share * sum(sizes)
        total += size * fits
        (chosen if fits else rest).append(path)
    return chosen, rest


def identical2(world):
    """Two hosts full of the same files, a third with the rest and room: it must take from them."""
    sizes = lognormal(world.random, FILES)
    paths, rest = share_of(0.69, sizes, packed(world, sizes, [sum(sizes) * .695] * 3))
    for name, planted in (("b0", paths), ("b1", paths), ("b2", rest)):
        world.plant(name, "s0", planted)
    world.settle()


def sleepers(world):
    """Some of eight hosts wake in one of twenty turns only."""
    make(world, hosts(1, .9, .8, .7, .6, .5, .4, .3), 0.05, ("s", 2))
    world.rare = {"b1": .05, "b4": .05, "b6": .05}
    world.settle(limit=120, quiet=30)
    world.rare.clear()
    world.settle(count=False)


def nup(world):
    """N goes from 2 to 3 and back."""
    make(world, hosts(1, .9, .8, .6, .5), 0.03, ("s", 3))
    for replicas in (2, 3, 2):
        world.sources["s0"] = world.sources["s0"]._replace(replicas=replicas)
        world.begin()
        world.settle()


def overfull(world):
    """Full, then 10 % more files."""
    make(world, hosts(1, 1, .8, .6, .5), 0.0, ("s", 2))
    world.settle()
    world.add_files("s0", lognormal(world.random, FILES // 10))
    world.settle()


SCENARIOS = {
    "seed": seed, "trap": trap,
    "unequal_exact": spread((1, .5, .5), 0, 2, files=100, equal=True),
    "unequal_ln1": spread((1, .5, .5), .01, 2),
    "n3_exact": spread((1, 1, .5, .5), 0, 3, files=100, equal=True),
    "n4_exact": spread((1, 1, 1, 1, 1, 1), 0, 4, files=120, equal=True),
    "n3_ln3": spread((1, .9, .6, .3, .2), .03, 3),
    "skew_ln3": spread((.9, .5, .25, .15, .1, .05, .05), .03, 2),
    "frag": frag, "frag2": frag2(0.1), "frag2_half": frag2(0.5), "bigfiles": bigfiles(0), "bigfiles3": bigfiles(.03),
    "twoloc": twoloc,
    "multi3": spread((1, 1, 1, 1, 1), .03, 2, 1, 3),
    "multi_uneq3": spread((1, 2, .5, .5, 3, 1), .03, 2, 2, 2, 3),
    "multi4": spread((1, 1, 2, 1, 1, .5, .7), .05, 4, 2, 1),
    "pair": pair, "growth": growth, "death": death, "join": join, "shrink": shrink,
    "identical": identical, "identical2": identical2, "sleepers": sleepers, "nup": nup,
    "infeasible90": spread((1, .9, .6, .3, .2), -.1, 2), "infeasible50": spread((1, .9, .6, .3, .2), -.5, 2),
    "several90": spread((1, 2, 1, 1, 1), -.1, 2, 1, 3, files=FILES // 3),
    "several60": spread((1, 2, 1, 1, 1), -.4, 2, 1, 3, files=FILES // 3),
    "overfull": overfull,
}

IMPOSSIBLE = {"pair", "infeasible90", "infeasible50", "several90", "several60", "overfull"}
"""Scenarios in which there is not enough room (or hosts) for what is wanted."""


def run(name, number, further=10):
    """One scenario with one seed; returns its Outcome."""
    with tempfile.TemporaryDirectory(prefix="cbackup-placement-", dir=IN_MEMORY) as base:
        world = TrialWorld("%s %d" % (name, number), base)
        with contextlib.closing(world), mock.patch.multiple(
                cbackup, clock=world.clock, in_parallel=lambda function, items: [function(item) for item in items],
                room_limit=lambda spec, settled: spec.size):    # whatever is free where this runs
            world.clock.time += world.random.random()
            SCENARIOS[name](world)
            return Outcome(world, further)


HEADER = "%-14s %6s %7s  %7s  %15s  %6s  %6s  %8s  %6s" % (
    "scenario", "slack", "settled", "rounds", "waste", "churn", "used", "useless", "s/run")


def line(name, outcomes, seconds):
    rounds = [outcome.rounds for outcome in outcomes]
    waste = [100 * outcome.waste for outcome in outcomes]
    impossible = name in IMPOSSIBLE
    return "%-14s %6s %7s  %3d /%2d  %5.1f / %5.1f %%  %6s  %6s  %8s  %6.2f" % (
        name, "%.1f %%" % (100 * min(outcome.slack for outcome in outcomes)),
        "-" if impossible else "%d/%d" % (sum(outcome.settled for outcome in outcomes), len(outcomes)),
        statistics.median(rounds), max(rounds), statistics.median(waste), max(waste),
        sum(1 for outcome in outcomes if outcome.churn) or "0",
        "%.1f %%" % (100 * min(outcome.used for outcome in outcomes)) if impossible else "",
        "%.2f %%" % (100 * max(outcome.useless for outcome in outcomes)) if impossible else "", seconds / len(outcomes))


def main():
    parser = argparse.ArgumentParser(description="Try the rules of placing with many seeds.")
    parser.add_argument("--real", action="store_true", help="with real clients and servers, and small files")
    parser.add_argument("--seeds", type=int, help="default: 16, with --real 1")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--scenario", action="append", choices=sorted(SCENARIOS))
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each seed")
    args = parser.parse_args()
    one = run
    if args.real:
        from tests import placement_real
        one = placement_real.run
    seeds = args.seeds or (1 if args.real else 16)
    print(HEADER, flush=True)
    for name in args.scenario or SCENARIOS:
        begun, outcomes = os.times(), []
        for number in range(args.first, args.first + seeds):
            outcomes.append(one(name, number))
            if args.verbose:
                print("    seed %d:" % number, vars(outcomes[-1]), flush=True)
        print(line(name, outcomes, sum(os.times()[:4]) - sum(begun[:4])), flush=True)


if __name__ == "__main__":
    sys.exit(main())
