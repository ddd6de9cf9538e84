"""The scenarios of tests.placement with real clients and servers: `python3 -m tests.placement --real`.

Sizes are scaled down, so that a gigabyte of the simulation is a few kilobytes on the disk. What is counted is taken from
the disks and from what the clients print; nothing here looks into a database.
"""

import collections
import os
import shutil
import time

from tests import placement
from tests.harness import Cluster, some_bytes, write_file

BYTES = 4096
"""Bytes on the disk for a gigabyte of the simulation."""

Group = collections.namedtuple("Group", "bytes copy_hosts files")


def scaled_down(size):
    return round(size * BYTES / placement.GB)


def scaled_up(size):
    return size * placement.GB // BYTES


class RealWorld(placement.World):
    """A cluster of real processes, in which a round is one pass of each client, one after the other in random order."""

    def __init__(self, seed):
        super().__init__(seed)
        self.cluster = Cluster()
        self.passes = 0
        self.edits = 0          # when the configuration was written last
        self.over = set()       # backups that had less room than they held when the round began
        self.files = {}         # source -> {path: size on the disk}
        self.planted = set()    # backups with copies that no server knows yet

    def close(self):
        self.cluster.close()

    # -- the cluster

    def place_of(self, backup):
        return self.cluster.path("backup", backup)

    def begin(self):
        """Take over what was added or changed since the last time."""
        cluster = self.cluster
        for thing in list(self.sources.values()) + list(self.backups.values()):
            cluster.add_host(thing.host)
        for name, spec in self.sources.items():
            if name not in cluster.sources:
                cluster.source(name, spec.host)
                self.files[name] = {}
            cluster.sources[name] = cluster.sources[name]._replace(options={"replicas": spec.replicas})
        for name, spec in self.backups.items():
            if name not in cluster.backups:
                cluster.backup(name, spec.host, 0, path=spec.path)
            cluster.backups[name] = cluster.backups[name]._replace(options={"size": str(scaled_down(spec.size))})
        self.edited()
        new = {thing.host for thing in list(self.sources.values()) + list(self.backups.values())} - set(cluster.servers)
        if new:
            cluster.start(*sorted(new))

    def edited(self):
        """Write the configuration, each time in another second: between edits of the same one it would be by chance which
        of them is in force where none has been yet."""
        self.edits = max(self.edits + 1, int(time.time()))
        self.cluster.write_config()
        for host in self.cluster.hosts:
            os.utime(os.path.join(self.cluster.home(host), "cbackup.conf"), (self.edits, self.edits))

    def add_files(self, source, sizes):
        paths = []
        for size in sizes:
            path = "f%06d" % next(self.serial)
            # Different sizes stay different from nothing: an empty file is none that needs a place.
            self.files[source][path] = max(1, scaled_down(size))
            write_file(os.path.join(self.cluster.sources[source].path, path),
                       some_bytes(self.files[source][path], (source, path)))
            paths.append(path.encode())
        return paths

    def delete_files(self, source, paths):
        for path in paths:
            os.unlink(os.path.join(self.cluster.sources[source].path, path.decode()))
            del self.files[source][path.decode()]

    def plant(self, backup, source, paths):
        """Copies that are there already: the backup's first pass finds them, and has them confirmed."""
        self.planted.add(backup)
        folder = os.path.join(self.cluster.backups[backup].path, source)
        os.makedirs(folder, exist_ok=True)
        for path in paths:
            shutil.copy2(os.path.join(self.cluster.sources[source].path, path.decode()), folder)

    def room(self, backup):
        return scaled_up(int(self.cluster.backups[backup].options["size"]))

    def used(self, backup):
        return scaled_up(self.cluster.kept_bytes(backup))

    # -- time goes by

    def wait(self, seconds):
        self.cluster.advance(int(seconds))

    def find_planted(self):
        """The first passes, for which there is no room beyond what lies there already: they can copy nothing yet."""
        backups, options = self.cluster.backups, {name: self.cluster.backups[name].options for name in self.planted}
        for name in self.planted:
            backups[name] = backups[name]._replace(options={"size": str(self.cluster.kept_bytes(name))})
        self.edited()
        for name in sorted(self.planted):   # a directory with something in it is taken only when somebody says so
            self.one_pass(backups[name].host, "--adopt", name)
        assert not self.copied and not self.dropped, "what was planted was not recognised"
        for name in self.planted:
            backups[name] = backups[name]._replace(options=options[name])
        self.edited()
        self.planted.clear()

    def round(self):
        if self.planted:
            self.find_planted()
        copied, dropped = self.copied, self.dropped
        hosts = sorted({spec.host for name, spec in self.backups.items()
                        if name not in self.down and self.random.random() < self.rare.get(name, 1.0)})
        self.random.shuffle(hosts)
        self.over = {name for name, free in self.free().items() if free < 0}
        self.settled = bool(hosts)
        for host in hosts:
            self.one_pass(host)
        if min(self.free().values()) < 0:
            self.settled = False    # it counts copies only, and somebody has still too many
        return (self.copied, self.dropped) != (copied, dropped)

    def one_pass(self, host, *words):
        before = self.lying()
        result = self.cluster.client(host, *words)
        self.useless += self.useless_of(host, before)
        assert result.rc in (0, 1), str(result)
        figures = result.json
        assert not figures["unreachable"] and not figures["failed_files"], str(result)
        self.passes += 1
        self.copied += scaled_up(figures["copied_bytes"])
        self.dropped += scaled_up(figures["dropped_bytes"])
        self.settled = self.settled and figures["settled"]
        for name, free in self.free().items():
            assert free >= 0 or name in self.over, "%s keeps more than its size: %s" % (name, result)

    # -- what came of it

    def holders(self, source):
        """{path: hosts that have a whole copy of it}, of those that are up and that count for this source."""
        own = self.sources[source].host
        return {path: {self.backups[name].host for name in found if name not in self.down} - {own}
                for path, found in self.cluster.copies_on_disk(source).items()}

    def groups(self, source):
        sums = {}
        for path, hosts in self.holders(source).items():
            key = frozenset(hosts)
            size, files = sums.get(key, (0, 0))
            sums[key] = size + scaled_up(self.files[source][path]), files + 1
        return [Group(size, sorted(hosts), files) for hosts, (size, files) in sorted(sums.items(), key=lambda i: sorted(i[0]))]

    def spare(self):
        spare = dict.fromkeys(self.backups, 0)
        for source, spec in self.sources.items():
            for path, hosts in self.holders(source).items():
                for name in self.backups:
                    if len(hosts) > spec.replicas and os.path.exists(self.cluster.kept_as(name, source, path)):
                        spare[name] += scaled_up(self.files[source][path])
        return spare

    def lying(self):
        """{(source, path): hosts on which a file of that name lies}: quicker than `holders`, between two passes."""
        found = {(source, path): set() for source in self.files for path in self.files[source]}
        for source, path in found:
            for name, spec in self.backups.items():
                if os.path.lexists(self.cluster.kept_as(name, source, path)):
                    found[source, path].add(spec.host)
        return found

    def useless_of(self, host, before):
        """Bytes of second copies that a pass of this host made in place of a file of the source that has none."""
        after, useless = self.lying(), 0
        room = max(scaled_down(free) for name, free in self.free().items() if self.backups[name].host == host)
        for source, sizes in self.files.items():
            bare = min((sizes[path] for path in sizes if not after[source, path]), default=None)
            if bare is not None and self.sources[source].host != host:
                useless += sum(sizes[path] for path in sizes if host in after[source, path] - before[source, path]
                               and before[source, path] and bare <= room + sizes[path])
        return scaled_up(useless)

    def check_words(self):
        """What the program says of itself is what lies on the disks."""
        check = self.cluster.run(sorted(self.cluster.servers)[0], "status", "--check")
        whole = self.missing() == 0
        assert (check.rc == 0) == whole, "%s\nmissing: %d bytes" % (check, self.missing())
        assert self.settled == whole, "the clients said %s\nmissing: %d bytes" % (
            "that all is settled" if self.settled else "that something is to be done", self.missing())


def run(name, number, further=10):
    """One scenario with one seed; returns its Outcome. The directories stay when it fails."""
    world = RealWorld("%s %d" % (name, number))
    try:
        placement.SCENARIOS[name](world)
        world.check_words()
        outcome = placement.Outcome(world, further)
        world.close()
    except BaseException:
        world.close()
        world.cluster.say_where()
        raise
    world.cluster.remove()
    outcome.passes = world.passes
    return outcome
