"""What can be done to a cluster from outside, and what must hold nevertheless.

Shared by the tests that break things (test_held, test_changes, test_faults, test_decay) and by the soak. Nothing here
looks into a database: `violations` knows only the contract, the source's directory and the backups' directories.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import unittest

import cbackup
from tests.harness import PROGRAM, TOP, digest_of, free_port, read_file, walk
from tests.members import Member

BOOKKEEPING = re.compile(r"(backup\.db.*|identity.*|lock|config.*|cbackup\.conf.*|catalog(/.*)?)\Z")
"""What lies below .cbackup and is no file of a source, nor part of one: it does not count for a backup's `size`."""


def kill_points():
    """The named points at which the program can be made to die, as its source has them."""
    with open(PROGRAM, encoding="utf-8") as file:
        return sorted(set(re.findall(r"\btest_point\(\"([^\"]+)\"\)", file.read())))


# ---- file systems -----------------------------------------------------------------------------------------------

def mount_or_skip(test, *arguments):
    """mount(8) for the time of a test (or, with a class, of its tests); skips it where that is not possible."""
    skip = getattr(test, "skipTest", None) or _skip
    cleanup = test.addClassCleanup if isinstance(test, type) else test.addCleanup
    if os.geteuid() != 0:
        skip("only root can mount a file system")
    if subprocess.call(["mount"] + list(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
        skip("no file system can be mounted here: mount %s" % " ".join(arguments))
    cleanup(unmount, arguments[-1])


def _skip(reason):
    raise unittest.SkipTest(reason)


def tmpfs_or_skip(test, path, size="16m"):
    """A small, empty file system at `path` for the time of a test."""
    os.makedirs(path, exist_ok=True)
    mount_or_skip(test, "-t", "tmpfs", "-o", "size=" + size, "none", path)


def folding_or_skip(test, path, size=32 << 20):
    """A small, empty FAT or exFAT file system at `path` for the time of a test; to it `A` and `a` are one name."""
    os.makedirs(path, exist_ok=True)
    cleanup = test.addClassCleanup if isinstance(test, type) else test.addCleanup
    image = path.rstrip("/") + ".image"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for make, mount in (("mkfs.vfat", ["mount", "-o", "loop,iocharset=utf8"]), ("mkfs.exfat", ["mount", "-o", "loop"]),
                        ("mkfs.exfat", ["mount.exfat-fuse"])):
        if os.geteuid() != 0 or not shutil.which(make) or not shutil.which(mount[0]):
            continue
        with open(image, "wb") as file:
            file.truncate(size)
        if subprocess.call([make, image], **quiet) != 0:
            continue
        device = image
        if mount[0] != "mount":
            try:
                device = subprocess.check_output(["losetup", "-f", "--show", image], stderr=subprocess.DEVNULL).decode().strip()
            except subprocess.CalledProcessError:
                continue
            cleanup(subprocess.call, ["losetup", "-d", device], **quiet)
        if subprocess.call(mount + [device, path], **quiet) == 0:
            cleanup(unmount, path)
            return
    (getattr(test, "skipTest", None) or _skip)("no file system that folds names can be mounted here")


def unmount(path):
    """Takes away what is mounted at `path`, in use or not; nothing when nothing is."""
    subprocess.call(["umount", "-l", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fill(path):
    """Writes a file at `path` until its file system is full; deleting it makes room again."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


class FailingCalls:
    """System calls that fail, in all processes of a cluster: a library from tests/data/faults.c, see there, is preloaded into
    them. To be made before the first of them is started, by a Starter that has the cluster's `variables`."""

    def __init__(self, cluster):
        """Raises unittest.SkipTest where there is no compiler for it."""
        library, self.list = cluster.path("faults.so"), cluster.path("faults")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", library, os.path.join(TOP, "tests/data/faults.c"), "-ldl"]
        if not sys.platform.startswith("linux") or not shutil.which("cc") or subprocess.call(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
            raise unittest.SkipTest("no C compiler for a library that is preloaded")
        self.heal()
        cluster.variables.update(LD_PRELOAD=library, CBACKUP_FAULTS=self.list)

    def fail(self, calls, number, pattern, skip=0, every=1):
        """From now on these calls (joined by commas) fail with an error's number where the path matches; of each process the
        first `skip` do not, and then only each `every`-th one does."""
        self.lines.append("%s %d %d %d %s\n" % (calls, number, skip, every, pattern))
        self._write()

    def heal(self):
        """All is well again."""
        self.lines = []
        self._write()

    def _write(self):
        with open(self.list, "w") as file:      # not another file: some processes have it open
            file.write("".join(self.lines))

    def failed(self):
        """["CALL PATH"] of what has failed since the last time that this was asked."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            with open(self.list + ".log", "r+") as file:
                found = file.read().splitlines()
                file.truncate(0)
        return found


def share_failing(cls, size):
    """A cluster for a class of tests whose calls may be made to fail, not started yet: cls.c; cls.calls; and a source of 12
    files on s, cls.source, with backups of this size on a and b. Without a compiler the class is skipped."""
    cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
    try:
        cls.calls = FailingCalls(c)
    except unittest.SkipTest as reason:
        cls.skip_class(str(reason))
    cls.start_by("tests.starter", c.variables)
    cls.source = c.source("docs", "s", {"d%d/f%d" % (n % 3, n): 3000 + n for n in range(12)})
    for host in "ab":
        c.backup("b" + host, host, size)


# ---- processes --------------------------------------------------------------------------------------------------

def process_table():
    """{process id: (parent's, one letter for its state, command line)}; of /proc where there is one, ps(1) may be missing."""
    table = {}
    if os.path.exists("/proc/self/stat"):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError):
                state, parent = read_file("/proc/%s/stat" % pid).rpartition(b")")[2].split()[:2]
                words = read_file("/proc/%s/cmdline" % pid).replace(b"\0", b" ").strip()
                table[int(pid)] = int(parent), state.decode(), words.decode("utf-8", "replace")
        return table
    output = subprocess.run(["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "stat=", "-o", "args="],
                            stdout=subprocess.PIPE, check=True).stdout.decode("utf-8", "replace")
    for row in output.splitlines():
        pid, parent, state, *words = row.split(None, 3)
        table[int(pid)] = int(parent), state[0], "".join(words)
    return table


def processes_with(text):
    """Command lines of all processes that have `text` in them."""
    return [words for _, _, words in process_table().values() if text in words]


def descendants(pid):
    """{process id: command line} of all that descends from a process."""
    table = [(child, parent, words) for child, (parent, _, words) in process_table().items() if words]
    found, grown = {}, True
    while grown:
        grown = False
        for child, parent, command in table:
            if child not in found and (parent == pid or parent in found):
                found[child] = command
                grown = True
    return found


def kill_rsyncs_of(process):
    """SIGKILL for the rsyncs below a process; how many there were."""
    found = [pid for pid, command in descendants(process.pid).items()
             if os.path.basename(command.split()[0]).startswith("rsync")]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


class Proxy:
    """A port that passes connections on to another, until it is told to cut or to stall them.

    cut_after, stall_after: bytes that come back from the server, over all connections; then every connection is closed,
    or on the one that carries data then nothing moves any more. None: never.
    """

    def __init__(self, port):
        self.target = port
        self.port, self._holder = free_port()
        self.cut_after = self.stall_after = None
        self.passed = 0
        self._stop = threading.Event()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Cuts its connections; then the port refuses others."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)       # or the accept() at work takes one more
        self._listener.close()
        self._holder.close()

    def _accept(self):
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client):
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server:
            while not self._stop.is_set():
                if self.cut_after is not None and self.passed >= self.cut_after:
                    return
                ready, _, _ = select.select([client, server], [], [], 0.05)
                for end in ready:
                    data = end.recv(1 << 14)
                    if not data:
                        return
                    self.passed += len(data) if end is server else 0
                    (client if end is server else server).sendall(data)
                if ready and self.stall_after is not None and self.passed >= self.stall_after:
                    self.stall_after = None
                    self._stop.wait()


REDIRECT = """import socket
connect = socket.create_connection
socket.create_connection = lambda address, *rest, **more: connect(
    (address[0], {%d: %d}.get(address[1], address[1])), *rest, **more)
"""


def redirected(cluster, host, port, other, *arguments, **more):
    """Starts a command on a host for which what listens on `port` is reached at `other`, say a Proxy's. Returns a Process."""
    return cluster.spawn(host, *arguments, CBACKUP_TEST_BEFORE=REDIRECT % (port, other), **more)


# ---- what must hold ---------------------------------------------------------------------------------------------

def regular_files(root, below=""):
    """{relative path: lstat} of the plain files below root/below; {} when there is no such directory."""
    top = os.path.join(root, below)
    return {relative: info for relative, _, info in walk(top) if stat.S_ISREG(info.st_mode)} if os.path.isdir(top) else {}


def room_taken(cluster, backup):
    """Bytes of everything in a backup that is not bookkeeping, each inode once."""
    root = cluster.backups[backup].path
    return sum({(info.st_dev, info.st_ino): info.st_size for relative, info in regular_files(root).items()
                if not (relative.startswith(".cbackup/") and BOOKKEEPING.match(relative[len(".cbackup/"):]))}.values())


def holders(cluster, source):
    """{relative path: set of hosts that hold exactly its bytes} for each file of a source, exclusions not regarded."""
    return {name: {cluster.backups[backup].host for backup in backups} - {cluster.sources[source].host}
            for name, backups in cluster.copies_on_disk(source).items()}


def anywhere(cluster, digest):
    """Hosts of the backups that hold a file of this digest under any name, old versions included."""
    return {backup.host for backup in cluster.backups.values()
            if any(digest_of(os.path.join(backup.path, relative)) == digest for relative in regular_files(backup.path))}


def violations(cluster, settled=True, added=(), sizes=True):
    """What does not hold in a cluster in which no client is at work: lines for people.

    settled: every file has its copies, nothing is left of old passes. added: files (below backups) put there by hand.
    sizes: False where a backup has just been made smaller than what it must keep.
    """
    lines = []
    for backup in cluster.backups.values():
        root = backup.path
        others = [os.path.join(root, name.split("/", 1)[1]) for name in added if name.startswith(backup.name + "/")]
        taken = room_taken(cluster, backup.name) - sum(os.path.getsize(path) for path in others if os.path.exists(path))
        if sizes and "size" in backup.options and taken > cbackup.parse_size(str(backup.options["size"])):
            lines.append("%s keeps %d bytes, more than its size %s" % (backup.name, taken, backup.options["size"]))
        for kind in ("incoming", "moving") if settled else ():
            for name in regular_files(root, ".cbackup/" + kind):
                lines.append("%s: left over: .cbackup/%s/%s" % (backup.name, kind, name))
    for source in cluster.sources.values():
        lines += _violations_of(cluster, source, settled, added)
    return lines


def _violations_of(cluster, source, settled, added):
    lines, there = [], holders(cluster, source.name)
    wanted = int(source.options.get("replicas", cluster.keys["replicas"]))
    for backup in cluster.backups.values():
        kept = {name: info for name, info in regular_files(backup.path, source.name).items()
                if os.path.join(backup.name, source.name, name) not in added}
        if backup.host == source.host and kept:
            lines.append("%s is on the host of %s and holds %s" % (backup.name, source.name, sorted(kept)[:3]))
        for name, info in kept.items() if settled else ():
            if name not in there:
                lines.append("%s holds %s/%s, which is not in the source" % (backup.name, source.name, name))
                continue
            own = os.lstat(os.path.join(source.path, name))
            if backup.host not in there[name]:
                lines.append("%s holds %s/%s with other bytes" % (backup.name, source.name, name))
            elif (own.st_mode, own.st_mtime_ns) != (info.st_mode, info.st_mtime_ns):
                lines.append("%s holds %s/%s with mode %#o and time %d instead of %#o and %d" % (
                    backup.name, source.name, name, info.st_mode, info.st_mtime_ns, own.st_mode, own.st_mtime_ns))
    if settled:
        lines += ["%s/%s is on %d hosts only: %s" % (source.name, name, len(hosts), sorted(hosts))
                  for name, hosts in there.items() if len(hosts) < wanted]
    counted = {}
    if source.host in cluster.servers:
        with Member(cluster, next(iter(cluster.backups)), source.name, source.host) as member:
            counted = member.ask("status")["sources"].get(source.name, {})
    for level in range(1, wanted + 1):
        believed = sum(files for copies, files in counted.get("copies", {}).items() if int(copies) >= level)
        real = sum(len(hosts) >= level for hosts in there.values())
        if believed > real:
            lines.append("%s: the server counts %d files with %d copies, there are %d" % (source.name, believed, level, real))
    return lines


def lose_state(cluster, host):
    """The whole state/ of a host is gone; its server, if it was up, died at that moment and is up again."""
    was_up = host in cluster.servers
    if was_up:
        cluster.kill(host)
    shutil.rmtree(os.path.join(cluster.home(host), "state"), ignore_errors=True)
    if was_up:
        cluster.start(host)
