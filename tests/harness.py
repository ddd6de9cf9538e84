"""A cluster of real processes on loopback, for tests that drive the program from outside.

Every test starts its hosts through `Cluster` and every process through `Process`: that is the one seam where deadlines,
tracebacks and left-over processes are looked after. What a test may rely on:

- each host has its own home, `BASE/HOST/home`, its own port on 127.0.0.1, and the same configuration as all others;
- whatever prints a Python traceback, or that cbackup itself made a mistake, fails the test, whichever process it was;
- no call waits for ever: each has a deadline (multiply them with $CBACKUP_TEST_PATIENCE on a slow machine);
- the program is cbackup.py of this directory, unless $CBACKUP_TEST_PROGRAM names another file, such as a built zipapp;
- when the test process dies, however it dies, its processes die too (see `Starter`);
- directories are removed, unless a test failed: then they stay, and the place is printed.

A host's processes see an environment like cron's: PATH, HOME, a C locale, and little else.
"""

import collections
import contextlib
import functools
import hashlib
import json
import multiprocessing.util
import os
import random
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from multiprocessing.reduction import send_handle

import cbackup
import tests
from tests import PROGRAM, TOP
from tests.starter import QUICK

PATIENCE = float(os.environ.get("CBACKUP_TEST_PATIENCE", "1"))

WHOLE = os.environ.get("CBACKUP_TEST_WHOLE") == "1"
"""Enumerations are gone through from end to end; else each day has a part of them, see Case.todays() and one_in()."""

DAY = int(os.environ.get("CBACKUP_TEST_DAY") or time.time() // 86400)

START_TIMEOUT = 20      # seconds until a server's ready line
STOP_TIMEOUT = 15       # seconds from SIGTERM to the exit
COMMAND_TIMEOUT = 90    # seconds for any other command

MISTAKES = ("Traceback (most recent call last)", "a mistake in cbackup itself", "a request failed")
"""Whatever prints one of these fails the test."""

CLIENT_KEYS = {"copied_files", "copied_bytes", "updated_files", "moved_files", "dropped_files", "dropped_bytes",
               "wire_bytes", "failed_files", "unreachable", "settled"}


# ---- waiting ----------------------------------------------------------------------------------------------------

def wait_for(predicate, timeout, message):
    """Returns the first true value of predicate(); fails with `message` (text, or a function giving it) after
    `timeout` seconds. Looks that take long, such as programs, are not taken one right after the other."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        began = time.monotonic()
        value = predicate()
        if value:
            return value
        ended = time.monotonic()
        if ended > deadline:
            raise AssertionError("after %g s: %s" % (timeout * PATIENCE, message() if callable(message) else message))
        time.sleep(max(0.005, 2 * (ended - began)))


# ---- processes --------------------------------------------------------------------------------------------------

class Result:
    """What a finished command left: rc, stdout, stderr, seconds, and the JSON object on its last line. No tuple: it stands
    behind `%`."""

    def __init__(self, command, rc, stdout, stderr, seconds):
        self.command, self.rc, self.stdout, self.stderr, self.seconds = command, rc, stdout, stderr, seconds

    def __str__(self):
        return "%s\n  exit code %s after %.1f s\n  stdout: %s\n  stderr: %s" % (
            " ".join(map(shlex.quote, self.command)), self.rc, self.seconds,
            self.stdout.strip() or "(nothing)", self.stderr.strip() or "(nothing)")

    @property
    def json(self):
        """The JSON object on the last line of standard output."""
        lines = self.stdout.splitlines()
        try:
            value = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise AssertionError("no JSON on the last line of: %s" % self)
        if not isinstance(value, dict):
            raise AssertionError("not a JSON object on the last line of: %s" % self)
        return value

    @property
    def text(self):
        return self.stdout + self.stderr

    @property
    def error_lines(self):
        return [line for line in self.stderr.splitlines() if line.strip()]


class Starter:
    """The process that starts all others for this test process, and kills them when this one is gone, see tests/starter.py.

    module: another one that ends in tests.starter's main(); environment: variables that it has besides."""

    _ours = None

    def __init__(self, module="tests.starter", environment=()):
        self.pid, self.lock = os.getpid(), threading.Lock()
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-S", "-B", "-m", module, str(theirs.fileno())], cwd=TOP,
                                            env=dict(os.environ, **dict(environment)), stdin=subprocess.DEVNULL,
                                            pass_fds=[theirs.fileno()], start_new_session=True)
        self.pem = self.connection.recv()
        multiprocessing.util.Finalize(None, self.close, exitpriority=0)

    def close(self):
        if self.pid == os.getpid():
            self.connection.close()
            self.process.wait(10)

    @classmethod
    def ours(cls):
        if cls._ours is None or cls._ours.pid != os.getpid():
            cls._ours = cls()
        return cls._ours

    @classmethod
    def replace(cls, starter):
        """From now on `starter` is ours; returns the one that was."""
        before, cls._ours = cls._ours, starter
        return before

    def ask(self, request, *files):
        """Its answer to a request, for which it gets the descriptors of the files."""
        with self.lock:
            self.connection.send(dict(request, files=len(files)) if files else request)
            for file in files:
                send_handle(self.connection, file.fileno(), self.process.pid)
            return self.connection.recv()


class Process:
    """One process in its own session, with its output in files, so that no reader can be held up by its children.

    terminal: a file for its input and output instead; confined: umask, user or memory, see confine() in tests/starter.py.
    """

    def __init__(self, command, env=None, cwd=None, terminal=None, **confined):
        self.command = list(command)
        self.started = time.monotonic()
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        self._starter, self._code, self._result = Starter.ours(), None, None
        self.pid = self._starter.ask({
            "command": self.command, "environment": dict(os.environ if env is None else env), "cwd": cwd or os.getcwd(),
            "confined": confined}, *([terminal] * 3 if terminal else (self._out, self._err)))

    @staticmethod
    def _text(file):
        # pread, because the position of the file is shared with the child that writes.
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode("utf-8", "surrogateescape")

    @property
    def stdout(self):
        return self._text(self._out)

    @property
    def stderr(self):
        return self._text(self._err)

    @property
    def running(self):
        if self._code is None:
            self._code = self._starter.ask(self.pid)
        return self._code is None

    def ends_within(self, seconds):
        """Waits for its end, at most that long; whether it has come."""
        deadline, pause = time.monotonic() + seconds, 0.0005
        with contextlib.suppress(AttributeError, OSError):      # Python 3.9 on Linux
            if self.running:
                handle = os.pidfd_open(self.pid)
                select.select([handle], [], [], seconds)
                os.close(handle)
        while self.running and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        return not self.running

    def signal(self, number):
        if self.running:
            os.kill(self.pid, number)

    def kill(self):
        """SIGKILL for the whole group; returns the Result."""
        self._kill()
        return self.wait(10)

    def _kill(self):
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout=COMMAND_TIMEOUT):
        """The Result; fails, after killing the process, when it takes longer, or when it printed a traceback."""
        if self._result is None:
            late = not self.ends_within(timeout * PATIENCE)
            if late:
                self._kill()
                self.ends_within(10)
            self._result = Result(self.command, self._code, self.stdout, self.stderr, time.monotonic() - self.started)
            self._out.close()
            self._err.close()
            if late:
                raise AssertionError("still running after %g s, killed: %s" % (timeout * PATIENCE, self._result))
            for words in MISTAKES:
                if words in self._result.text:
                    raise AssertionError("%s: %s" % (words, self._result))
        return self._result


def plain_environment(home, **more):
    """An environment like cron's, with `home` as the user's home directory."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": TOP, "CBACKUP_TEST": "1", "CBACKUP_TEST_CODE": os.environ["CBACKUP_TEST_CODE"],
           "TMPDIR": tempfile.gettempdir()}     # what of it is killed leaves something there
    env.update(more)
    return env


def program(*arguments, file=PROGRAM):
    """The command line that starts the program as a user does, but without the machine's packages: it needs none of them, and to
    look for them can take as long as all the rest."""
    return [sys.executable, "-S", "-B", file] + [os.fspath(argument) for argument in arguments]


def quick_program(*arguments):
    """The same, but what a Process makes of it starts quickly, see Starter, and CBACKUP_TEST_BEFORE in its environment is code
    that is run first, on the module `cbackup`. PYTHONPATH has to be there, see plain_environment(), for those who run it in
    another way."""
    return QUICK + [os.fspath(argument) for argument in arguments]


def free_port():
    """(port, holder): a TCP port of 127.0.0.1 that no other test uses while `holder` is open.

    It is below the range from which systems choose ports for outgoing connections, so that nothing takes it while
    its server is down; and it is reserved among the tests that run at the same time by the UDP port of that number.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(10240, 32000)
        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            holder.bind(("127.0.0.1", port))
            socket.create_server(("", port)).close()
            return port, holder
        except OSError:
            holder.close()
    raise AssertionError("no free port on 127.0.0.1")


@functools.lru_cache(None)
def cluster_pem():
    """The bytes of a cluster.pem, made by the program once for each test process: the one that the starter is used to."""
    return Starter.ours().pem or new_cluster_pem()


def new_cluster_pem():
    """The bytes of a cluster.pem that no other cluster has."""
    with tempfile.TemporaryDirectory(prefix="cbackup-test-init-") as base:
        result = Process(quick_program("--home", os.path.join(base, "home"), "init"), plain_environment(base), base).wait(30)
        if result.rc != 0:
            raise AssertionError("init failed: %s" % result)
        with open(os.path.join(base, "home", "cluster.pem"), "rb") as file:
            return file.read()


# ---- trees of files ---------------------------------------------------------------------------------------------

Entry = collections.namedtuple("Entry", "kind digest mode mtime_ns target")
Link = collections.namedtuple("Link", "target")      # in make_tree: a symbolic link
DIRECTORY = object()                                 # in make_tree: a directory, maybe empty
FIFO = object()                                      # in make_tree: a named pipe


def some_bytes(size, seed):
    """`size` bytes that do not compress and are the same for the same seed."""
    return random.Random(repr(seed)).getrandbits(8 * size).to_bytes(size, "little") if size else b""


def make_tree(root, files):
    """Makes what `files` says below `root`: {relative path: bytes | str | size | Link(target) | DIRECTORY | FIFO}."""
    os.makedirs(root, exist_ok=True)
    for name, content in files.items():
        path = os.path.join(root, os.fsdecode(name))
        os.makedirs(path if content is DIRECTORY else os.path.dirname(path), exist_ok=True)
        if content is DIRECTORY:
            continue
        if content is FIFO:
            os.mkfifo(path)
        elif isinstance(content, Link):
            os.symlink(os.fsdecode(content.target), path)
        else:
            write_file(path, content if not isinstance(content, int) else some_bytes(content, name))


def write_file(path, content):
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def digest_of(path):
    return hashlib.sha256(read_file(path)).hexdigest()


def walk(root, *gone):
    """(relative path, path, lstat) of everything below `root`, in sorted order, following no link. What raises one of
    these errors is left out."""
    todo = [""]
    while todo:
        folder, names = todo.pop(), ()
        with contextlib.suppress(*gone):
            names = sorted(os.listdir(os.path.join(root, folder)))
        for relative in [folder + "/" + name for name in names] if folder else names:
            path = root + "/" + relative
            with contextlib.suppress(*gone):
                info = os.lstat(path)
                yield relative, path, info
                if stat.S_ISDIR(info.st_mode):
                    todo.append(relative)


def tree(root):
    """{relative path: Entry} of everything below `root`: an account of it that owes nothing to the program."""
    kinds = {"-": "file", "d": "dir", "l": "link", "p": "fifo", "s": "socket"}
    result = {}
    for relative, path, info in walk(root):
        kind = kinds.get(stat.filemode(info.st_mode)[0], "other")
        result[relative] = Entry(kind, digest_of(path) if kind == "file" else None,
                                 None if kind == "link" else stat.S_IMODE(info.st_mode), info.st_mtime_ns,
                                 os.readlink(path) if kind == "link" else None)
    return result


def differences(expected, actual, ignore=()):
    """Lines that say how one tree (or result of tree()) differs from another.

    `ignore` holds fields that do not count, as "mtime_ns", or of one kind only, as "dir.mtime_ns".
    """
    expected = tree(expected) if isinstance(expected, str) else expected
    actual = tree(actual) if isinstance(actual, str) else actual
    lines = ["missing: %r" % name for name in sorted(set(expected) - set(actual))]
    lines += ["too much: %r" % name for name in sorted(set(actual) - set(expected))]
    for name in sorted(set(expected) & set(actual)):
        for field in Entry._fields:
            want, have = getattr(expected[name], field), getattr(actual[name], field)
            if want != have and not {field, "%s.%s" % (expected[name].kind, field)} & set(ignore):
                shown = "%#o is %#o" if field == "mode" and None not in (want, have) else "%r is %r"
                lines.append(("%r: %s " + shown) % (name, field, want, have))
    return lines


def inodes(root):
    """{relative path: (inode, size, mtime, ctime)} of the files below `root`: changes when a file is touched at all."""
    return {relative: (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            for relative, _, info in walk(root) if not stat.S_ISDIR(info.st_mode)}


def copy_wrong_bytes(cluster, source, number):
    """Lines that name the files of a source which have not exactly `number` true copies, or a wrong one besides."""
    lines = []
    for relative, holders in cluster.copies_on_disk(source).items():
        there = [backup for backup in cluster.backups if os.path.lexists(cluster.kept_as(backup, source, relative))]
        if len(holders) != number or there != holders:
            lines.append("%s: true copies in %s, something in %s" % (relative, holders, there))
    return lines


# ---- the cluster ------------------------------------------------------------------------------------------------

Source = collections.namedtuple("Source", "name host path options")
Backup = collections.namedtuple("Backup", "name host path options")


class Cluster:
    """Hosts on loopback. Add sources and backups, start the hosts, run clients; the configuration writes itself.

        with Cluster("s", "a", "b", replicas=2) as cluster:
            cluster.source("photos", host="s", files={"1.jpg": 1000})
            cluster.backup("b1", host="a", size="1M")
            cluster.start()
            cluster.settle()
    """

    def __init__(self, *hosts, file=None, **keys):
        self.base = os.path.realpath(tempfile.mkdtemp(prefix="cbackup-test-"))
        self.file = file or os.environ.get("CBACKUP_TEST_PROGRAM")
        self.hosts = []
        self.keys = dict({"name": "test", "replicas": 2, "scan": "1h", "scan_min": "0s"}, **keys)
        self.sources = {}
        self.backups = {}
        self.servers = {}
        self.prefix = {}        # host: words that stand before each of its commands
        self._clock = os.path.join(self.base, "clock")
        self.variables = {"CBACKUP_TEST_CLOCK": self._clock}    # of the environment of all of its processes
        self.now = 0
        self._written = None
        self.ports = {}
        self._holders = []
        write_file(self._clock, "0\n")
        for host in hosts:
            self.add_host(host)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        try:
            self.close()
        finally:
            self.remove() if kind is None else self.say_where()

    def close(self):
        """Stops every server; fails when one of them does not end as it should."""
        try:
            for host in list(self.servers):
                self.servers[host].signal(signal.SIGTERM)
            for host in list(self.servers):
                self._ended(host)
        finally:
            for server in self.servers.values():
                server.kill()
            self.servers.clear()
            for holder in self._holders:
                holder.close()

    def remove(self):
        for folder, folders, _ in os.walk(self.base):
            for name in folders:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    with contextlib.suppress(OSError):
                        os.chmod(path, 0o700)
        shutil.rmtree(self.base, ignore_errors=True)

    def say_where(self):
        print("\nkept: %s" % self.base, file=sys.stderr)
        if tests.KEPT is not None:
            os.write(tests.KEPT, b"kept\n")

    # -- files and configuration

    def path(self, *names):
        return os.path.join(self.base, *names)

    def home(self, host):
        return self.path(host, "home")

    def add_host(self, host):
        """A host that was not there from the start; nothing when it is there."""
        if host not in self.ports:
            self.hosts.append(host)
            self.ports[host], holder = free_port()
            self._holders.append(holder)
            self.make_home(host, host)

    def make_home(self, name, host=None):
        """BASE/NAME/home with cluster.pem (and a `host` file), as on a machine that has just been set up."""
        home = self.path(name, "home")
        os.makedirs(home, 0o700)
        write_file(os.path.join(home, "cluster.pem"), cluster_pem())
        os.chmod(os.path.join(home, "cluster.pem"), 0o600)
        if host:
            write_file(os.path.join(home, "host"), host + "\n")
        return home

    def fresh_home(self, name):
        """A machine of which the cluster has never heard: nothing but cbackup.conf and cluster.pem."""
        home = self.make_home(name)
        write_file(os.path.join(home, "cbackup.conf"), self.config())
        return home

    def source(self, name, host, files=(), path=None, **options):
        """Makes a source's directory with `files` in it and its line in the configuration; returns its path."""
        path = path or self.path(host, "source", name)
        make_tree(path, dict(files))
        self.sources[name] = Source(name, host, path, options)
        return path

    def backup(self, name, host, size=None, path=None, **options):
        """Makes a backup's empty directory and its line in the configuration; returns its path."""
        if size is not None:
            options["size"] = size
        path = path or self.path(host, "backup", name)
        os.makedirs(path)
        self.backups[name] = Backup(name, host, path, options)
        return path

    def config(self):
        """The text of the configuration."""
        def lines(things):
            for thing in things.values():
                words = [key if one is True else "%s=%s" % (key, shlex.quote(str(one))) for key, value in thing.options.items()
                         for one in (value if isinstance(value, (list, tuple)) else [value])]
                yield " ".join(["%s = %s:%s" % (thing.name, thing.host, shlex.quote(thing.path))] + words)
        return "\n".join(["[cluster]"] + ["%s = %s" % item for item in self.keys.items()] +
                         ["[hosts]"] + ["%s = 127.0.0.1:%d" % item for item in self.ports.items()] +
                         ["[sources]"] + list(lines(self.sources)) + ["[backups]"] + list(lines(self.backups))) + "\n"

    def write_config(self, *hosts):
        """Gives every home the configuration, or only those of `hosts`: then the passes have to carry it to the others.
        Done by itself before a command, when it changed."""
        text = self.config()
        if text != self._written:
            for host in hosts or self.hosts:
                path = os.path.join(self.home(host), "cbackup.conf")
                write_file(path, text)
                if self._written is None:   # long ago: of two first versions within a second neither is the newer one
                    os.utime(path, (time.time() - 60,) * 2)
            self._written = text

    def advance(self, seconds):
        """Sets the clocks of all processes of the cluster forward."""
        self.now += seconds
        write_file(self._clock + ".new", "%s\n" % self.now)
        os.rename(self._clock + ".new", self._clock)

    # -- processes

    def environment(self, host, **more):
        return plain_environment(self.path(host), **dict(self.variables, **more))

    def spawn(self, host, *arguments, **more):
        """Starts any command on a host; `more` are variables of its environment. Returns a Process."""
        self.write_config()
        words = ("--home", self.home(host)) + arguments
        command = quick_program(*words) if self.file is None else program(*words, file=self.file)
        return Process(self.prefix.get(host, []) + command, self.environment(host, **more), self.path(host))

    def run(self, host, *arguments, timeout=COMMAND_TIMEOUT, **more):
        """Runs any command on a host to its end; returns the Result."""
        return self.spawn(host, *arguments, **more).wait(timeout)

    def start(self, *hosts):
        """Starts the servers of these hosts (default: of all) and waits until they are ready."""
        hosts = hosts or [host for host in self.hosts if host not in self.servers]
        for host in hosts:
            if host in self.servers:
                raise AssertionError("the server of %s is running already" % host)
            self.servers[host] = self.spawn(host, "server")
        for host in hosts:
            self._wait_ready(host)

    def _wait_ready(self, host):
        server = self.servers[host]
        wanted = "cbackup server %s: listening on " % host

        def ready():
            if not server.running:
                del self.servers[host]
                raise AssertionError("the server of %s ended before it was ready: %s" % (host, server.wait()))
            lines = server.stdout.split("\n")[:-1]
            return any(line.startswith(wanted) and line.endswith(":%d" % self.ports[host]) for line in lines)
        wait_for(ready, START_TIMEOUT, lambda: "no line %r...:%d from the server of %s; stdout: %r; stderr: %r" % (
            wanted, self.ports[host], host, server.stdout, server.stderr))

    def stop(self, *hosts):
        """SIGTERM for the servers of these hosts (default: of all), which must then exit 0."""
        for host in hosts or list(self.servers):
            self.servers[host].signal(signal.SIGTERM)
            self._ended(host)

    def _ended(self, host):
        result = self.servers.pop(host).wait(STOP_TIMEOUT)
        if result.rc != 0:
            raise AssertionError("the server of %s did not exit 0 at SIGTERM: %s" % (host, result))

    def kill(self, *hosts):
        """SIGKILL for the servers of these hosts and all of their children: the machines are gone."""
        for host in hosts:
            self.servers.pop(host).kill()

    def client(self, host, *arguments, **more):
        """One pass of a host's client, with --json; returns the Result."""
        return self.run(host, "client", "--json", *arguments, **more)

    def passes(self, order):
        """One pass of each host's client, in this order; returns the Results."""
        return [self.client(host) for host in order]

    def round(self, *arguments, hosts=None):
        """A pass of each host with a backup (or of `hosts`), all at the same time; returns their figures. All must be well."""
        clients = [self.spawn(host, "client", "--json", *arguments) for host in hosts or self.backup_hosts()]
        return self._figures([client.wait() for client in clients])

    @staticmethod
    def _figures(results):
        for result in results:
            if result.rc != 0 or result.json["failed_files"]:
                raise AssertionError("a client's pass failed: %s" % result)
        return [result.json for result in results]

    def backup_hosts(self):
        return list(dict.fromkeys(backup.host for backup in self.backups.values()))

    def settle(self, orders=None, limit=8, hosts=None):
        """Runs clients until all say that they are settled; returns the figures of each client.

        `orders`: names of hosts, or one such list for each round, used in turns: a pass of one after the other. Without
        it, all hosts with a backup (or `hosts`) at the same time, each for as many passes as have something to do, and then
        again those that are not settled. Fails when a client does not exit 0, and after `limit` rounds.
        While a server is not running, no pass is settled: then a round in which nothing was done is enough.
        """
        if orders and isinstance(orders[0], str):
            orders = [orders]
        figures, hosts = [], hosts or self.backup_hosts()
        for turn in range(limit):
            if orders:
                now = self._figures(self.passes(orders[turn % len(orders)]))
            else:
                now = self.round("--until-settled", hosts=hosts)
            figures += now
            if all(map(self._is_settled, now)):
                return figures
            hosts = [host for host, one in zip(hosts, now) if not self._is_settled(one)]
        raise AssertionError("not settled after %d rounds; the last one: %s" % (limit, now))

    def _is_settled(self, figures):
        down = set(figures["unreachable"])
        return figures["settled"] or bool(down) and not down & set(self.servers) and not any(
            value for value in figures.values() if isinstance(value, int))

    def restore(self, host, source, *paths, to=None, options=(), **more):
        """Runs `restore SOURCE [PATH ...]` on a host, into the directory `to`; returns the Result."""
        options = list(options) + ([] if to is None else ["--to", to])
        return self.run(host, "restore", *options, source, *paths, **more)

    def status(self, host=None):
        """`status --json`, asked on a host whose server is up."""
        return self.run(host or next(iter(self.servers), self.hosts[0]), "status", "--json").json

    # -- what is on the disks

    def copies_on_disk(self, source):
        """{relative path of each file of the source: [names of the backups that hold exactly its bytes]}."""
        found = {}
        for relative, path, info in walk(self.sources[source].path):
            if stat.S_ISREG(info.st_mode):
                copies = {backup: self.kept_as(backup, source, relative) for backup in self.backups}
                found[relative] = [backup for backup, copy in copies.items() if os.path.isfile(copy)
                                   and not os.path.islink(copy) and read_file(path) == read_file(copy)]
        return found

    def kept_as(self, backup, source, relative=""):
        """The path of a file's copy in a backup, as the contract says."""
        return os.path.join(self.backups[backup].path, source, relative)

    def attic(self, backup, source):
        """[(relative path, bytes)] of the old versions that a backup keeps of a source."""
        attic = os.path.join(self.backups[backup].path, ".cbackup", "attic", source)
        if not os.path.isdir(attic):
            return []
        return [(relative, read_file(path)) for relative, path, info in walk(attic) if stat.S_ISREG(info.st_mode)]

    def kept(self, backup):
        """What a backup keeps: {path relative to the backup: lstat} of files and old versions, without bookkeeping.

        Works while a client is changing the backup."""
        return {relative: info for relative, _, info in walk(self.backups[backup].path, FileNotFoundError)
                if not stat.S_ISDIR(info.st_mode)
                and (relative.startswith(".cbackup/attic/") or not relative.startswith(".cbackup/"))}

    def kept_bytes(self, backup):
        """The sum of the sizes of the files that a backup keeps, old versions included, each inode once."""
        return sum({(info.st_dev, info.st_ino): info.st_size for info in self.kept(backup).values()
                    if stat.S_ISREG(info.st_mode)}.values())

    def kept_inodes(self, backup):
        """Changes when anything that a backup keeps is touched at all."""
        return {name: (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
                for name, info in self.kept(backup).items()}


# ---- the base of all tests --------------------------------------------------------------------------------------

LARGE = 100000      # characters of two values from which on only their first difference is shown


def first_difference(first, second):
    """Where two values differ, as short text."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in list(first) + list(second) if key not in first or key not in second or first[key] != second[key]]
        return "\n".join("[%r]: %.300r != %.300r" % (key, first.get(key), second.get(key)) for key in keys[:10])
    if isinstance(first, (set, frozenset)) and isinstance(second, (set, frozenset)):
        return "in one of them only: %.2000r" % sorted(first ^ second, key=repr)[:10]
    if isinstance(first, (str, bytes, list, tuple)) and type(first) is type(second):
        at = next((at for at, (one, other) in enumerate(zip(first, second)) if one != other), min(len(first), len(second)))
        most = 300 if isinstance(first, (str, bytes)) else 3
        return "from %d on: %.1000r != %.1000r" % (at, first[at:at + most], second[at:at + most])
    return "%.1000r != %.1000r" % (first, second)


NOT_TODAY = "not all on each day: this is day %d (CBACKUP_TEST_DAY); CBACKUP_TEST_WHOLE=1 runs all" % DAY


def one_in(number, *always):
    """For a class: one in `number` of its tests is run each day, and those that are named in `always`; the second stage of
    .ci/run runs the others, too."""
    def mark(cls):
        names = [name for name in unittest.TestLoader().getTestCaseNames(cls) if name not in always]
        for at, name in enumerate(names):
            if not WHOLE and (at + DAY) % number:
                setattr(cls, name, unittest.skip(NOT_TODAY)(getattr(cls, name)))
        return cls
    return mark


class Case(unittest.TestCase):
    """A test with clusters and directories of its own, or one cluster for all the tests of a class."""

    maxDiff = 20000
    _shared = None

    @classmethod
    def share_cluster(cls, *hosts, **keys):
        """In setUpClass: a Cluster for all tests of the class."""
        cluster = Cluster(*hosts, **keys)
        state = {"ran": False, "failed": False}

        def end():
            try:
                cluster.close()
            except BaseException:
                state["failed"] = True
                raise
            finally:
                # When no test ran at all, setUpClass failed.
                cluster.say_where() if state["failed"] or not state["ran"] else cluster.remove()
        cls._shared = state
        cls.addClassCleanup(end)
        return cluster

    @classmethod
    def start_by(cls, module, environment=()):
        """In setUpClass: another Starter for the tests of the class, see there."""
        starter = Starter(module, environment)
        before = Starter.replace(starter)
        cls.addClassCleanup(Starter.replace, before)

    @classmethod
    def skip_class(cls, reason):
        """In setUpClass, when it turns out that the shared cluster is of no use here: nothing went wrong."""
        cls._shared["ran"] = True
        raise unittest.SkipTest(reason)

    def run(self, result=None):
        # Directories can be dealt with only here: before Python 3.11 a test's result is not known in its cleanups.
        self._mine = []
        count = self._count(result)
        returned = super().run(result)
        failed = self._count(result) > count
        if self._shared is not None:
            self._shared["ran"] = True
            self._shared["failed"] |= failed
        for thing in self._mine:
            thing.say_where() if failed else thing.remove()
        return returned

    @staticmethod
    def _count(result):
        return len(getattr(result, "failures", ())) + len(getattr(result, "errors", ()))

    def cluster(self, *hosts, **keys):
        """A Cluster for this test alone; its servers are stopped at the end."""
        cluster = Cluster(*hosts, **keys)
        self._mine.append(cluster)
        self.addCleanup(cluster.close)
        return cluster

    def todays(self, things, number):
        """`number` of the `things` that a test goes through, others each day; the second stage of .ci/run has all."""
        things = list(things)
        if WHOLE or len(things) <= number:
            return things
        with self.subTest("the others"):
            self.skipTest("%d of %d: %s" % (number, len(things), NOT_TODAY))
        first = DAY * number % len(things)
        return (things * 2)[first:first + number]

    def directory(self):
        """A directory for this test alone."""
        cluster = Cluster()
        self._mine.append(cluster)
        os.unlink(cluster.path("clock"))
        return cluster.base

    def assertEqual(self, first, second, msg=None):
        """As ever; but large values are not laid side by side line by line, which takes minutes."""
        if first != second and len(repr(first)) + len(repr(second)) > LARGE:
            self.fail(self._formatMessage(msg, "two large values differ: " + first_difference(first, second)))
        super().assertEqual(first, second, msg)

    def assertRc(self, expected, result):
        if result.rc != expected:
            self.fail("exit code %s expected: %s" % (expected, result))

    def assertOneError(self, result, *words):
        """Exactly one line on standard error, with these words in it."""
        self.assertEqual(1, len(result.error_lines), "one line on standard error expected: %s" % result)
        for word in words:
            self.assertIn(word, result.stderr, str(result))

    def assertSilent(self, result):
        self.assertRc(0, result)
        self.assertEqual(("", ""), (result.stdout, result.stderr), str(result))

    def assertSameTree(self, expected, actual, ignore=()):
        """The same names, kinds, bytes, modes, mtimes in ns and link targets; `ignore` as in differences()."""
        lines = differences(expected, actual, ignore)
        if lines:
            more = ["... and %d more" % (len(lines) - 20)] if len(lines) > 20 else []
            self.fail("the trees differ:\n  " + "\n  ".join(lines[:20] + more))

    def assertCopies(self, cluster, source, count):
        """Every file of the source is on `count` distinct hosts, none of them the source's own, and on no more."""
        wrong = []
        for name, backups in cluster.copies_on_disk(source).items():
            hosts = [cluster.backups[backup].host for backup in backups]
            if len(hosts) != count or len(set(hosts)) != count or cluster.sources[source].host in hosts:
                wrong.append("%r is in the backups %s on %s" % (name, backups, hosts))
        if wrong:
            self.fail("%d copies on distinct hosts expected:\n  %s" % (count, "\n  ".join(wrong[:20])))

    def assertWithinSize(self, cluster, *backups):
        """No backup keeps more than its `size`."""
        for name in backups or cluster.backups:
            size = cbackup.parse_size(str(cluster.backups[name].options["size"]))
            self.assertLessEqual(cluster.kept_bytes(name), size, "backup %s keeps more than its size" % name)


@contextlib.contextmanager
def listening():
    """(port, socket) of a listener on 127.0.0.1 that accepts in its queue and says nothing."""
    port, holder = free_port()
    with holder, socket.create_server(("127.0.0.1", port), backlog=64) as listener:
        yield port, listener
