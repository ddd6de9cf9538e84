"""A random history of all that can happen to a cluster, and after each quiet period: does everything still hold?

    python3 -m tests.soak --minutes 10 --seed 1

Files are written, deleted, renamed and become other things; clients run in any order, two at once, beside a verify or a
restore, and are killed at any point; servers are killed, started, and started twice; lines are cut or stall; the power fails;
copies and old versions rot; state/ and databases are lost; disks fill up, become read-only, and are away for a while; sources
are emptied and come back; whole backups are lost and replaced; disks of sources are replaced (`cp -a`), packages installed
again or over each other, files edited so that neither size nor time shows it, disks of backups put back in an older state.
Where a C compiler is, system calls fail now and then.
Now and then "safe" is compared with the disks. From time to time all is quiet: every host verifies and runs
passes until nothing is left to do; then the sources, the backups and a restore are compared from outside. Stops at the first
violation, with the seed and the last steps of the history; the directories stay.
"""

import argparse
import calendar
import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import unittest

from tests import faults
from tests.harness import Cluster, Starter, differences, digest_of, read_file, some_bytes, tree, walk, write_file

STEPS = 12          # between two quiet periods
PERIODS = 4         # quiet periods of one history, each on what the ones before have left
CALLS = ["read,pread", "write,pwrite", "fsync", "syncfs", "rename", "link", "readdir"]     # those that may fail
ROUNDS = 8          # passes of every host until a quiet period must be settled
KEEP = 48 * 3600    # seconds for which old versions are kept


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
        self.added = {}             # BACKUP/PATH of files that were put there by hand: their bytes
        self.secret = set()         # sources in which bytes changed and times did not, since all was quiet
        self.replaced = {}          # digests of files that had all their copies and were changed or deleted: when
        self.troubled = False       # old versions may have been lost in this period: a disk was full, or is a new one
        self.calls = self.before = None     # what makes calls fail; the Starter that there was
        self.mounted = []
        self.repairs = []           # what makes the disks good again
        self.snapshot = None        # (backup, copy of its directory) from earlier
        hosts = ["s", "a", "b", "c"]
        self.c = Cluster(*hosts, replicas=2, keep="%ds" % KEEP)
        with contextlib.suppress(unittest.SkipTest):
            self.calls = faults.FailingCalls(self.c)
            self.before = Starter.replace(Starter("tests.starter", self.c.variables))
        self.c.source("docs", "s", {"d%d/f%d" % (n % 5, n): self.dice.randrange(3000) for n in range(30)})
        self.c.source("more", "a", {"f%d" % n: self.dice.randrange(400000) for n in range(5)})
        roomy = self.dice.random() < 0.5
        for host in hosts:
            self.c.backup("b" + host, host, "20M" if roomy else self.dice.choice(["6M", "20M"]))
        self.roomy = all(backup.options["size"] == "20M" for backup in self.c.backups.values())
        self.note("sizes: %s" % {name: backup.options["size"] for name, backup in self.c.backups.items()})
        self.small_disk = self.small_state = None
        if os.geteuid() == 0:
            self.small_disk, self.small_state = self.dice.choice("bc"), self.dice.choice("sabc")
            if not self.mount("32m", self.c.path(self.small_disk, "backup")):
                self.small_disk = None
            elif not self.mount("8m", os.path.join(self.c.home(self.small_state), "state")):
                self.small_state = None
            if self.small_disk:
                os.mkdir(self.c.backups["b" + self.small_disk].path)

    def mount(self, size, path):
        """A small file system at `path`; False where that is not possible."""
        os.makedirs(path, exist_ok=True)
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=" + size, "none", path], stderr=subprocess.DEVNULL):
            return False
        self.mounted.append(path)
        return True

    def unmount(self, keep):
        """The small file systems go; with `keep`, what is in them stays where it is."""
        for path in self.mounted:
            if keep:
                shutil.copytree(path, path + ".kept", symlinks=True)
            faults.unmount(path)
            if keep and not os.path.ismount(path):
                shutil.rmtree(path)
                os.rename(path + ".kept", path)

    def end(self):
        """The processes of the next history are started as those before it were."""
        if self.calls:
            Starter.replace(self.before).close()

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
            self.troubled = False
            self.lose_a_host()
            for _ in range(STEPS):
                if time.monotonic() > deadline:
                    self.quiet()
                    return False
                step = self.dice.choice(self.STEPS)
                step(self)
                self.check_safe(safe)
                if self.dice.random() < 0.25:
                    self.check_word()
            self.quiet()
        return True

    def settle_down(self):
        """Every disk good, every server up; then passes until all of a round are settled. Mass changes are accepted."""
        self.repair()
        down = [host for host in self.c.hosts if host not in self.c.servers]
        if down:
            self.c.start(*down)
        for turn in range(ROUNDS):
            if turn in (0, 1):
                for host in self.c.hosts:
                    if "b" + host in self.rotten:
                        self.check_said(self.c.run(host, "verify"))
            results = [client.wait() for client in [self.c.spawn(host, "client", "--json") for host in self.c.hosts]]
            if turn and all(result.rc == 0 and result.json["settled"] for result in results):
                self.rotten.clear()
                return
            for name, facts in self.c.status().get("sources").items():
                if facts["state"] == "held":
                    self.note("accept %s" % name)
                    self.check_said(self.c.run("s", "accept", name))
        self.fail("not settled after %d rounds:\n%s\n%s" % (
            ROUNDS, "\n".join(map(str, results)), "\n".join(faults.violations(self.c, added=self.added)[:20])))

    def repair(self):
        while self.repairs:
            self.repairs.pop()()

    def quiet(self):
        self.note("-- quiet --")
        self.settle_down()
        self.secret.clear()
        lines = faults.violations(self.c, added=self.added)
        if lines:
            self.fail("\n".join(lines[:30]))
        self.check_added()
        self.check_old_versions()
        self.check_idle()
        self.check_restore()
        self.periods += 1

    def check_said(self, result):
        """A command that was left alone comes to its end, and says why when it could not do everything."""
        if result.rc not in (0, 1) or result.rc and not result.error_lines:
            self.fail("not the end of a command: %s" % result)

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

    def check_added(self):
        """What somebody put into a backup by hand lies there as it did."""
        for name, content in self.added.items():
            backup, path = name.split("/", 1)
            path = os.path.join(self.c.backups[backup].path, path)
            if not os.path.isfile(path) or read_file(path) != content:
                self.fail("%s was put there by hand, and is not there as it was" % name)

    def check_old_versions(self):
        """Old versions are there until `keep` is over, and not longer."""
        now = time.time() + self.c.now
        for backup in self.c.backups.values():
            for name in faults.regular_files(backup.path, ".cbackup/attic"):
                since = calendar.timegm(time.strptime(name.split("/")[1][:16], "%Y%m%dT%H%M%SZ"))
                if since < now - KEEP - 120:
                    self.fail("%s keeps an old version for too long: %s" % (backup.name, name))
        for digest, (since, name) in list(self.replaced.items()):
            if since < now - KEEP + 120:
                del self.replaced[digest]
            elif self.roomy and not self.troubled and not faults.anywhere(self.c, digest):
                self.fail("the old version of %s is nowhere" % name)
        if self.troubled:
            self.replaced.clear()

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
                    self.replaced[digest] = time.time() + self.c.now, "%s/%s" % (source, name)
                elif len(there[name]) < 2:
                    self.fail("%s/%s was on two hosts and is on %s now" % (source, name, sorted(there[name])))

    def check_word(self):
        """What is called safe, and compared, is on two hosts. A pass goes before, so that the servers have looked."""
        host, begun = self.dice.choice("bc"), time.monotonic()     # which have no source: they ask both servers to look
        if self.rotten or self.c.client(host).rc not in (0, 1):
            return
        for name, facts in self.c.status(host)["sources"].items():
            if self.c.sources[name].host not in self.c.servers or facts["state"] != "ok" or facts["underserved_files"] \
                    or facts["unproven_files"] != 0 \
                    or facts["last_scan"] is None or facts["last_scan"] > time.monotonic() - begun:
                continue
            lines = ["%s is on %s" % (path, sorted(hosts)) for path, hosts in faults.holders(self.c, name).items()
                     if len(hosts) < 2 and len(self.hosts_with(name, path)) < 2]
            if lines:
                self.fail("all of %s is called safe, but\n%s" % (name, "\n".join(lines[:20])))

    def hosts_with(self, source, path):
        """The hosts that have a file's bytes under any name: a renamed one has its old name until their pass."""
        source = self.c.sources[source]
        return faults.anywhere(self.c, digest_of(os.path.join(source.path, path))) - {source.host}

    # -- steps: what people do --

    def files_of(self, source, kinds=(stat.S_ISREG,)):
        return [relative for relative, _, info in walk(source.path) if any(kind(info.st_mode) for kind in kinds)]

    def pick(self):
        return self.dice.choice(list(self.c.sources.values()))

    def some(self, most, kinds=(stat.S_ISREG,)):
        """(source, names of at most so many of its files)"""
        source = self.pick()
        names = self.files_of(source, kinds)
        return source, self.dice.sample(names, min(most, len(names)))

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
        source, names = self.some(2)
        for name in names:
            with open(os.path.join(source.path, name), "ab") as file:
                file.write(b"more %d" % self.count)
            self.note("append %s/%s" % (source.name, name))

    def delete(self):
        source, names = self.some(1, (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR))
        for name in names:
            path = os.path.join(source.path, name)
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            self.note("delete %s/%s" % (source.name, name))
            return source.name, name, path
        return None

    def edit_in_secret(self):
        """New bytes of the same size in the same inode, with the old time; and perhaps another name, mode or link."""
        source, names = self.some(2)
        for name in names:
            path = os.path.join(source.path, name)
            info = os.stat(path)
            self.flip(path)
            self.secret.add(source.name)
            also = self.dice.choice(["", "", "renamed", "chmod", "linked"])
            if also == "renamed":
                os.rename(path, path + "r")
            elif also == "chmod":
                os.chmod(path, 0o600 if info.st_mode & 0o077 else 0o640)
            elif also == "linked":
                os.link(path, path + "l%d" % self.count)
            self.count += 1
            self.note("edit in secret %s/%s %s" % (source.name, name, also))

    def install_again(self):
        """Files are removed and laid down anew, in another order, with the times that they had: the same or the next release."""
        source, names = self.some(6)
        release, kept = self.dice.random() < 0.5, {}
        for name in names:
            path = os.path.join(source.path, name)
            info, data = os.stat(path), read_file(path)
            kept[name] = info.st_mtime_ns, data if not release else some_bytes(len(data), (name, self.count))
            os.unlink(path)
        for name in reversed(names):
            path = os.path.join(source.path, name)
            write_file(path, kept[name][1])
            os.utime(path, ns=(kept[name][0], kept[name][0]))
        self.count += 1
        if release:
            self.secret.add(source.name)
        self.note("installed again%s: %s" % (", the next release" if release else "", names))

    def replace_source_disk(self):
        """As by `cp -a` to a new disk."""
        source = self.pick()
        os.rename(source.path, source.path + ".old")
        shutil.copytree(source.path + ".old", source.path, symlinks=True)
        shutil.rmtree(source.path + ".old")
        self.note("the disk of %s was replaced" % source.name)

    def old_disk(self):
        """The directory of a backup is kept, and put back later in the state of then: its copies since are gone."""
        if self.snapshot is None:
            host = self.dice.choice(self.c.hosts)
            path = self.c.backups["b" + host].path
            if host != self.small_disk and os.path.exists(os.path.join(path, ".cbackup", "identity")):
                self.snapshot = "b" + host, path + ".then"
                shutil.copytree(path, path + ".then", symlinks=True)
                self.note("the directory of b%s is kept" % host)
            return
        (name, kept), self.snapshot = self.snapshot, None
        path = self.c.backups[name].path
        identities = [os.path.join(one, ".cbackup", "identity") for one in (kept, path)]
        if os.path.exists(identities[1]) and len(set(map(read_file, identities))) == 1:
            shutil.rmtree(path)
            os.rename(kept, path)
            self.spoiled(name)
            self.added = {one: data for one, data in self.added.items() if not one.startswith(name + "/")
                          or os.path.isfile(os.path.join(path, one[len(name) + 1:]))}
            self.note("the directory of %s is put back as it was" % name)
        else:
            shutil.rmtree(kept)

    def rename(self):
        source, names = self.some(1, (stat.S_ISREG, stat.S_ISDIR))
        for old in names:
            onto = self.files_of(source)
            new = self.dice.choice(onto) if onto and self.dice.random() < 0.3 else self.new_name()
            path = self.place(source, new)
            if path and not (new + "/").startswith(old + "/"):
                with contextlib.suppress(OSError):
                    os.rename(os.path.join(source.path, old), path)
                    self.note("rename %s: %s -> %s" % (source.name, old, new))

    def swap(self):
        source, names = self.some(2)
        if len(names) > 1:
            one, two = (os.path.join(source.path, name) for name in names)
            os.rename(one, one + ".t")
            os.rename(two, one)
            os.rename(one + ".t", two)
            self.note("swap %s: %s" % (source.name, " <-> ".join(names)))

    def mode(self):
        source, names = self.some(1, (stat.S_ISREG, stat.S_ISDIR))
        for name in names:
            path = os.path.join(source.path, name)
            os.chmod(path, self.dice.choice([0o700, 0o755, 0o711] if os.path.isdir(path) else [0o600, 0o644, 0o755]))
            self.note("chmod %s/%s" % (source.name, name))

    def kind(self):
        """A path becomes something else."""
        deleted = self.delete()
        if not deleted:
            return
        source, name, path = deleted
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
        self.note("%s/%s becomes a %s" % (source, name, kind))

    def link(self):
        source, names = self.some(1)
        path = names and self.place(source, self.new_name())
        if path:
            with contextlib.suppress(OSError):
                os.link(os.path.join(source.path, names[0]), path)
                self.note("hard link %s" % path)

    # -- steps: what machines do --

    def passes(self, count, *hosts):
        """A pass of each of these hosts, and of so many others or the same."""
        for host in list(hosts) + self.dice.sample(self.c.hosts, count):
            self.check_said(self.c.client(host))
            self.note("client %s" % host)

    def client(self):
        self.passes(1)

    def clients(self):
        """Two at once; of two of one host one works, the other leaves the backup alone."""
        hosts = [self.dice.choice(self.c.hosts) for _ in range(2)]
        for client in [self.c.spawn(host, "client", "--json") for host in hosts]:
            self.check_said(client.wait())
        self.note("clients %s at once" % hosts)

    def killed_client(self):
        host, count = self.dice.choice(self.c.hosts), self.dice.choice([1, 1, 2, 3, 4, 5, 6, 8, 10, 15])
        result = self.c.client(host, CBACKUP_TEST_KILL="any:%d" % count)
        self.note("client %s killed at any:%d: %s" % (host, count, result.rc == -signal.SIGKILL))

    def client_killed_by_the_clock(self):
        host, seconds = self.dice.choice(self.c.hosts), self.dice.random() * 0.6
        client = self.c.spawn(host, "client")
        client.ends_within(seconds)
        client.kill()
        self.note("client %s killed after %.2f s" % (host, seconds))

    def server_dies_below_a_client(self):
        host = self.dice.choice(["s", "a"])
        if host not in self.c.servers:
            return
        clients = [self.c.spawn(one, "client", "--json") for one in "bc"]
        clients[0].ends_within(self.dice.random() * 0.5)
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
        if os.path.exists(path) and os.access(path, os.W_OK):
            kind = self.dice.choice(["gone", "garbage"])
            os.unlink(path) if kind == "gone" else write_file(path, some_bytes(20000, self.count))
            self.note("database of %s: %s" % (name, kind))

    def add_by_hand(self):
        name, source = self.dice.choice(list(self.c.backups)), self.dice.choice(list(self.c.sources))
        self.count += 1
        relative = self.dice.choice([source + "/own/%d", source + "/own %d", "beside/%d", "beside %d"]) % self.count
        path, content = os.path.join(self.c.backups[name].path, relative), b"mine %d" % self.count
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, content)
        except OSError:     # the disk is full or read-only just now
            with contextlib.suppress(OSError):
                os.unlink(path)
            return
        self.added[name + "/" + relative] = content
        self.note("added by hand: %s/%s" % (name, relative))

    def rot(self):
        name, found = self.copies()
        for relative in self.dice.sample(found, min(2, len(found))):
            self.flip(os.path.join(self.c.backups[name].path, relative))
            self.spoiled(name)
            self.note("rot in %s/%s" % (name, relative))

    def copies(self):
        """(a backup, paths in it of all that it keeps of sources)"""
        name = self.dice.choice(list(self.c.backups))
        return name, [os.path.join(source, one) for source in self.c.sources
                      for one in faults.regular_files(self.c.backups[name].path, source)
                      if os.path.join(name, source, one) not in self.added]

    def spoiled(self, name):
        """A backup's copies may not be what they were."""
        self.rotten.add(name)
        self.troubled = True

    def flip(self, path):
        """Another byte somewhere in a file, unless it is empty, with its times as before."""
        info, data = os.stat(path), bytearray(read_file(path))
        with contextlib.suppress(OSError, ValueError), open(path, "r+b") as file:       # the disk may be read-only just now
            data[self.dice.randrange(len(data))] ^= self.dice.randrange(1, 256)
            file.write(data)
            file.flush()
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    def rot_in_the_attic(self):
        """Old versions rot, too: they are no copies, and nothing may come of it."""
        name = self.dice.choice(list(self.c.backups))
        top = os.path.join(self.c.backups[name].path, ".cbackup", "attic")
        # Not what a client that was killed has linked: it is still a copy in its place as well.
        found = [path for path, info in faults.regular_files(top).items() if info.st_size and info.st_nlink == 1]
        for path in self.dice.sample(found, min(2, len(found))):
            self.replaced.pop(digest_of(os.path.join(top, path)), None)
            self.flip(os.path.join(top, path))
            self.note("rot in the attic of %s: %s" % (name, path))

    def by_hand(self):
        name, found = self.copies()
        root = self.c.backups[name].path
        if found and os.access(root, os.W_OK):
            relative = self.dice.choice(found)
            os.unlink(os.path.join(root, relative))
            self.spoiled(name)
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
            self.troubled = True
            self.added = {key: content for key, content in self.added.items() if not key.startswith(name + "/")}
            shutil.rmtree(self.c.backups[name].path)
            os.mkdir(self.c.backups[name].path)
            self.rotten.add(name)
            self.c.client(host, "--adopt", name)
            self.note("host %s lost and replaced" % host)

    # -- steps: two at once --

    def client_beside(self):
        """A client that is started during a verify or a restore, or before it."""
        host, other = self.dice.choice(self.c.hosts), self.dice.choice(self.c.hosts)
        source, target = self.pick(), self.c.path("aside")
        commands = [(host, "client", "--json"), self.dice.choice([
            (host, "verify"), (host, "verify"), (other, "restore", source.name, "--to", target)])]
        self.dice.shuffle(commands)
        first = self.c.spawn(*commands[0])
        first.ends_within(0.3 * self.dice.random())
        results = [first, self.c.spawn(*commands[1])]
        results = [one.wait() for one in results]
        for name in os.listdir(target) if os.path.isdir(target) and all(result.rc == 0 for result in results) else ():
            self.check_restored(source, os.path.join(target, name), name)
        shutil.rmtree(target, ignore_errors=True)
        self.note("%s and then %s: %s" % (" ".join(commands[0][:2]), " ".join(commands[1][:2]), [r.rc for r in results]))

    def check_restored(self, source, path, name):
        """A file whose times are those of the source's has its bytes, unless these were changed in secret
        just now."""
        own = os.path.join(source.path, name)
        if source.name not in self.secret and os.path.isfile(path) and os.path.isfile(own) and not os.path.islink(own):
            if os.stat(path).st_mtime_ns == os.stat(own).st_mtime_ns and digest_of(path) != digest_of(own):
                self.fail("%s/%s was restored with other bytes" % (source.name, name))

    def second_server(self):
        host = self.dice.choice(self.c.hosts)
        if host in self.c.servers:
            result = self.c.run(host, "server", timeout=30)
            if result.rc == 0 or not self.c.servers[host].running:
                self.fail("a second server on %s: %s" % (host, result))
            self.note("a second server on %s was refused" % host)

    # -- steps: lines and power --

    def bad_line(self):
        """The line between a client and a server is cut, or stalls for a while and is then cut."""
        server, host = self.dice.choice(["s", "a"]), self.dice.choice("bc")
        if server not in self.c.servers:
            return
        proxy = faults.Proxy(self.c.ports[server])
        fault, after = self.dice.choice(["cut_after", "stall_after"]), self.dice.choice([1, 5000, 20000, 100000, 400000])
        setattr(proxy, fault, after)
        client = faults.redirected(self.c, host, self.c.ports[server], proxy.port, "client", "--json")
        try:
            client.ends_within(3 if fault == "stall_after" else 30)
        finally:
            proxy.close()
        result = client.wait()
        self.note("client %s, line to %s: %s %d: %d" % (host, server, fault, after, result.rc))

    def power_failure(self):
        """A client's machine loses its power: what was not made durable may be short, or zeros."""
        host, count = self.dice.choice(self.c.hosts), self.dice.choice([1, 2, 3, 4, 5, 6, 8, 10, 15])
        if self.c.client(host, CBACKUP_TEST_KILL="any:%d" % count).rc != -signal.SIGKILL:
            return
        top = os.path.join(self.c.backups["b" + host].path, ".cbackup", "incoming")
        torn = []
        for name, info in faults.regular_files(top).items():
            path = os.path.join(top, name)
            if info.st_nlink == 1 and self.dice.random() < 0.7:       # else it is the old version in its place
                with contextlib.suppress(OSError):
                    os.truncate(path, self.dice.choice([0, info.st_size // 2]))
                    if self.dice.random() < 0.5:
                        os.truncate(path, info.st_size)
                    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
                    torn.append(name)
        self.note("power failure on %s at any:%d: torn: %s" % (host, count, torn))

    # -- steps: disks --

    def full_disk(self):
        """The disk of a backup fills up, or has room again."""
        if not self.small_disk:
            return
        ballast = self.c.path(self.small_disk, "backup", "ballast")
        self.troubled = True
        if os.path.exists(ballast):
            self.repair()
            self.note("disk of %s has room again" % self.small_disk)
            return
        client = self.c.spawn(self.small_disk, "client") if self.dice.random() < 0.5 else None
        if client:
            client.ends_within(self.dice.random() * 0.6)
        with contextlib.suppress(OSError):
            faults.fill(ballast)
            self.repairs.append(lambda: os.path.exists(ballast) and os.unlink(ballast))
        if client:
            client.wait()
        elif self.dice.random() < 0.7:
            self.check_said(self.c.client(self.small_disk))
        self.note("disk of %s is full%s" % (self.small_disk, ", below a client" if client else ""))

    def failing_calls(self):
        """The system says of some calls on some files that they cannot be done, during some passes."""
        if not self.calls:
            return
        calls, skip, every = self.dice.choice(CALLS), self.dice.randrange(30), self.dice.choice([1, 1, 3])
        where = self.dice.choice(["%s/source/*", "%s/backup/*", "%s/home/state/*"]) % self.c.path(self.dice.choice("sabc"))
        self.troubled = True
        self.calls.fail(calls, self.dice.choice([errno.EIO, errno.ENOSPC]), where, skip, every)
        try:
            self.passes(3)
        finally:
            self.calls.heal()
        failed = self.calls.failed()
        if failed:
            self.c.advance(25 * 3600)       # until then others are asked for what could not be copied
        self.note("%s failed on %s after %d, each %d: %d times" % (calls, where, skip, every, len(failed)))

    def read_only_disk(self):
        """The disk of a backup becomes read-only: for some clients, or for longer."""
        if not self.small_disk:
            return
        path = self.c.path(self.small_disk, "backup")
        if not os.access(path, os.W_OK) or subprocess.call(["mount", "-o", "remount,ro", path], stderr=subprocess.DEVNULL):
            return
        self.repairs.append(lambda: subprocess.check_call(["mount", "-o", "remount,rw", path]))
        self.passes(2, self.small_disk)
        back = self.dice.random() < 0.5
        if back:
            self.repair()
        self.note("disk of %s is read-only%s" % (self.small_disk, " for some passes" if back else ""))

    def full_state(self):
        """state/ of a host has no room during some passes."""
        if not self.small_state:
            return
        ballast = os.path.join(self.c.home(self.small_state), "state", "ballast")
        faults.fill(ballast)
        try:
            self.passes(2, self.small_state)
        finally:
            os.unlink(ballast)
        if self.small_state in self.c.servers and not self.c.servers[self.small_state].running:
            self.fail("the server of %s ended: %s" % (self.small_state, self.c.servers[self.small_state].wait()))
        self.note("state/ of %s was full during passes" % self.small_state)

    def backup_away(self):
        """The directory of a backup is away for some passes; there is only an empty mount point, which stays empty."""
        host = self.dice.choice(self.c.hosts)
        path = self.c.backups["b" + host].path
        if not os.path.exists(os.path.join(path, ".cbackup", "identity")) or not os.access(path, os.W_OK):
            return
        if all(name.startswith(".cbackup") for name in faults.regular_files(path)):
            return      # when state/ is lost besides, nobody knows a directory without a copy
        os.rename(path, path + ".away")
        os.mkdir(path)
        self.passes(2, host)
        found = list(tree(path))
        shutil.rmtree(path)
        os.rename(path + ".away", path)
        if any(not name.startswith(".cbackup") for name in found):
            self.fail("the empty mount point of %s was filled: %s" % ("b" + host, found[:5]))
        self.note("the directory of b%s was away during passes" % host)

    def source_away(self):
        """A source is gone or empty for some passes, and comes back: nothing of it changes in any backup."""
        source = self.pick()
        if not self.files_of(source):
            return
        self.passes(len(self.c.hosts))      # what was confirmed before may still be put into its place
        path, kind = source.path, self.dice.choice(["gone", "empty", "empty", "unmounted"])
        if kind == "unmounted" and (os.geteuid() or self.mount_over(path)):
            kind = "empty"
        if kind in ("gone", "empty"):
            os.rename(path, path + ".away")
        if kind == "empty":
            os.mkdir(path)
        before = self.copies_of(source)
        lost = self.dice.random() < 0.3
        if lost:
            faults.lose_state(self.c, source.host)
        self.passes(3)
        after = self.copies_of(source)
        if kind == "unmounted":
            faults.unmount(path)
        if kind == "empty":
            os.rmdir(path)
        if kind in ("gone", "empty"):
            os.rename(path + ".away", path)
        self.note("source %s was %s during passes%s" % (source.name, kind, ", and state/ was lost" if lost else ""))
        if before != after and not self.rotten:
            self.fail("copies of %s changed while it was %s: %s" % (source.name, kind, sorted(
                set(before.items()) ^ set(after.items()))[:10]))

    def mount_over(self, path):
        """An empty directory over another one; true when that cannot be done."""
        os.makedirs(self.c.path("void"), exist_ok=True)
        return subprocess.call(["mount", "--bind", self.c.path("void"), path], stderr=subprocess.DEVNULL)

    def copies_of(self, source):
        """Changes when any file of a source in any backup is touched."""
        return {"%s/%s" % (name, path): facts[:3] for name in self.c.backups
                for path, facts in self.c.kept_inodes(name).items() if path.startswith(source.name + "/")}

    STEPS = [write, write, write, append, delete, rename, rename, swap, mode, kind, link, client, client, client, clients,
             killed_client, killed_client, killed_client, killed_client, client_killed_by_the_clock, server, server,
             server_dies_below_a_client, state, database, rot, rot_in_the_attic, by_hand, add_by_hand, time_goes_by,
             clients, client_beside, second_server, bad_line, bad_line, power_failure, power_failure, full_disk, full_disk,
             read_only_disk, full_state, backup_away, source_away, edit_in_secret, edit_in_secret, edit_in_secret, install_again,
             install_again, replace_source_disk, replace_source_disk, old_disk, old_disk, failing_calls, failing_calls]


def run(seed, deadline, out=sys.stdout, periods=PERIODS):
    """One history; raises Violation (or what else went wrong), the history's tail printed. Returns its quiet periods."""
    history = History(seed)
    try:
        with contextlib.ExitStack() as stack, history.c:
            stack.callback(history.end)
            try:
                history.run(deadline, periods)
            except BaseException:
                history.c.close()
                history.unmount(keep=True)
                raise
            history.c.close()
            history.unmount(keep=False)
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
