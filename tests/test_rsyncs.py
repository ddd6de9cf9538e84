"""Whatever rsync a machine has: what is copied with it is whole, and what is its own fault is not said of another host."""

import os
import shlex
import shutil
import socket
import unittest

import cbackup
from tests import matrix
from tests.faults import tmpfs_or_skip
from tests.harness import PATIENCE, Case, Cluster, make_tree, some_bytes, write_file

OPENRSYNC = """\
#!/bin/sh
# What openrsync does otherwise, as far as it shows here.
case "$*" in
*--version*) echo "openrsync: protocol version 29"; echo "rsync version 2.6.9 compatible"; exit 0 ;;
*--daemon*)
    python3 -c 'import socket, sys; sys.exit(socket.socket(fileno=0).family != socket.AF_INET)' || exit 134
    exec %(rsync)s "$@" ;;
esac
%(rsync)s "$@" >"$0.$$"
code=$?
sed 's/^Total bytes received:/Total received:/' "$0.$$"
rm "$0.$$"
exit $code
"""


class RsyncCase(Case):
    def own_rsync(self, script):
        """A PATH on which rsync is this script; %(rsync)s in it is the real one."""
        folder = os.path.join(self.directory(), "tools")
        os.mkdir(folder)
        write_file(os.path.join(folder, "rsync"), script % {"rsync": shlex.quote(shutil.which("rsync"))} if "%" in script else script)
        os.chmod(os.path.join(folder, "rsync"), 0o755)
        return folder + os.pathsep + os.environ["PATH"]

    def make(self, *hosts, **keys):
        cluster = self.cluster(*hosts, replicas=1, **keys)
        self.source = cluster.source("docs", "s", {"f%d" % number: 3000 for number in range(20)})
        make_tree(self.source, {"large": some_bytes(300000, 1), "#odd name": b"1", "d/e f": b"2"})
        cluster.backup("b1", "a", "10M")
        return cluster


class OpenRsyncTest(RsyncCase):
    """The rsync of macOS 15 serves nothing but an internet socket."""

    def test_it_serves_a_source_and_a_backup_and_its_figures_are_read(self):
        path = self.own_rsync(OPENRSYNC)
        cluster = self.make("s", "a")
        for host in "sa":
            cluster.prefix[host] = ["env", "PATH=" + path]
        cluster.start()
        figures = cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        self.assertGreater(sum(one["wire_bytes"] for one in figures), 300000)
        to = cluster.path("restored")
        self.assertRc(0, cluster.restore("a", "docs", to=to))
        self.assertSameTree(self.source, to)

    def test_nobody_else_can_take_the_other_end(self):
        # A stranger who connects first: to the listener, as soon as there is one.
        strangers, real = [], socket.socket.listen

        def listen(listener, backlog):
            real(listener, backlog)
            stranger = socket.create_connection(listener.getsockname())
            strangers.append((stranger, listener.getsockname()))
        socket.socket.listen = listen
        self.addCleanup(lambda: [one.close() for one, _ in strangers])
        try:
            ours, theirs = cbackup.loopback_pair()
        finally:
            socket.socket.listen = real
        with ours, theirs:
            self.assertEqual((ours.getsockname(), ours.getpeername()), (theirs.getpeername(), theirs.getsockname()))
            ours.sendall(b"x")
            self.assertEqual(b"x", theirs.recv(10))
            stranger, address = strangers[0]
            stranger.settimeout(10 * PATIENCE)
            self.assertEqual(b"", stranger.recv(1))
            with self.assertRaises(OSError):
                socket.create_connection(address, 10)


class OwnFailureTest(RsyncCase):
    """A client's rsync that fails is this machine's trouble: named, no host is called unreachable, nothing stays claimed."""

    def check(self, script, words, code=1, **more):
        cluster = self.make("s", "a")
        cluster.start()
        path = self.own_rsync(script)
        result = cluster.client("a", PATH=path, **more)
        self.assertRc(code, result)
        self.assertOneError(result, *words)
        if code == 1:
            self.assertEqual([], result.json["unreachable"])
        self.assertNotIn("reached", result.stderr)
        figures = cluster.client("a")       # with a good one all is copied at once
        self.assertRc(0, figures)
        self.assertCopies(cluster, "docs", 1)
        result = cluster.restore("a", "docs", to=cluster.path("to"), PATH=path)
        self.assertRc(code, result)
        self.assertOneError(result, *words[1:])
        self.assertNotIn("no longer answers", result.stderr)
        self.assertRc(0, cluster.restore("a", "docs", to=cluster.path("to")))
        self.assertSameTree(self.source, cluster.path("to"))

    def test_one_that_is_killed(self):
        self.check('#!/bin/sh\ncase "$*" in *--version*) exec %(rsync)s "$@" ;; esac\nkill -9 $$\n',
                   ["b1", "this machine's rsync", "killed by signal 9"])

    def test_one_that_dies_of_its_own(self):
        self.check('#!/bin/sh\ncase "$*" in *--version*) exec %(rsync)s "$@" ;; esac\necho "out of luck" >&2\nexit 22\n',
                   ["b1", "this machine's rsync", "out of luck"])

    def test_one_that_is_killed_in_the_middle(self):
        # Its remote shell has begun by then.
        self.check('#!/bin/sh\ncase "$*" in *--version*) exec %(rsync)s "$@" ;; esac\n%(rsync)s "$@" --bwlimit=1 &\n'
                   'sleep 2\nkill -9 $!\nkill -9 $$\n', ["b1", "this machine's rsync", "killed by signal 9"])

    def test_one_that_is_no_program(self):
        self.check("\x7fELF no program\n", ["cannot be run", "rsync"], code=2)


class TemporaryDirectoryTest(RsyncCase):
    """Where temporary files go is of no importance."""

    def backed_up_with(self, folder):
        cluster = self.make("s", "a")
        cluster.start()
        self.assertRc(0, cluster.client("a", TMPDIR=folder))
        self.assertCopies(cluster, "docs", 1)
        self.assertRc(0, cluster.restore("a", "docs", to=cluster.path("to"), TMPDIR=folder))
        self.assertEqual([], os.listdir(folder))

    def test_its_name_may_be_odd(self):
        folder = os.path.join(self.directory(), "it's \"a\" $HOME: dir\n#1")
        os.mkdir(folder)
        self.backed_up_with(folder)

    def test_nothing_may_be_executable_there(self):
        folder = os.path.join(self.directory(), "noexec")
        os.mkdir(folder)
        tmpfs_or_skip(self, folder, "4m,noexec")
        self.backed_up_with(folder)


class MatrixTest(unittest.TestCase):
    """A short part of `python3 -m tests.matrix`: the oldest and the newest Python of this machine together."""

    def test_the_oldest_python_serves_the_newest(self):
        pythons = matrix.found_pythons()
        if len(pythons) < 2:
            self.skipTest("there are no two Pythons from 3.8 on here")
        self.assertEqual("", matrix.try_pair((pythons[0], None), (pythons[-1], None)))

    def test_a_pair_that_does_not_work_together_is_told(self):
        with Cluster() as place:
            write_file(place.path("rsync"), OPENRSYNC.replace('"openrsync: protocol version 29"', '""') % {"rsync": "false"})
            os.chmod(place.path("rsync"), 0o755)
            self.assertIn("rsync", matrix.try_pair((None, None), (None, place.base)))


if __name__ == "__main__":
    unittest.main()
