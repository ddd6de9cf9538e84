"""Whatever rsync a machine has: what is copied with it is whole, and what is its own fault is not said of another host."""

import os
import shlex
import shutil
import socket
import sys
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
    %(python)s -IS -c 'import socket, sys; sys.exit(socket.socket(fileno=0).family != socket.AF_INET)' || exit 134
    exec %(rsync)s "$@" ;;
esac
for word; do    # it hands names on without ./, and a server of its kind takes some for comments then
    case "$word" in --files-from=*) %(python)s -IS -c 'import sys; name = sys.argv[1].partition("=")[2]
names = [one for one in open(name, "rb").read().split(b"\\0") if one[:3] not in (b"./#", b"./;")]
open(name, "wb").write(b"\\0".join(names))' "$word" ;;
    esac
done
%(rsync)s "$@" >"$0.$$"
code=$?
sed 's/^Total bytes received:/Total received:/' "$0.$$"
rm "$0.$$"
exit $code
"""


FILES = dict({"f%d" % number: 3000 for number in range(20)}, **{"large": some_bytes(300000, 1), "#odd name": b"1", "d/e f": b"2"})


def with_tools(script, rsync):
    return script % {"rsync": shlex.quote(rsync), "python": shlex.quote(sys.executable)} if "%" in script else script


class RsyncCase(Case):
    def own_rsync(self, script):
        """A PATH on which rsync is this script; %(rsync)s in it is the real one."""
        folder = os.path.join(self.directory(), "tools")
        os.mkdir(folder)
        write_file(os.path.join(folder, "rsync"), with_tools(script, shutil.which("rsync")))
        os.chmod(os.path.join(folder, "rsync"), 0o755)
        return folder + os.pathsep + os.environ["PATH"]


class OpenRsyncTest(RsyncCase):
    """The rsync of macOS 15 serves nothing but an internet socket."""

    def test_it_serves_a_source_and_a_backup_and_its_figures_are_read(self):
        path = self.own_rsync(OPENRSYNC)
        cluster = self.cluster("s", "a", replicas=1)
        source = cluster.source("docs", "s", FILES)
        cluster.backup("b1", "a", "10M")
        make_tree(source, {"#dir/[x]/a*?": b"3", ";semi": b"4", "#back\\slash": b"5"})
        cluster.variables["PATH"] = path
        cluster.start()
        figures = cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        self.assertGreater(sum(one["wire_bytes"] for one in figures), 300000)
        to = cluster.path("restored")
        self.assertRc(0, cluster.restore("a", "docs", to=to))
        self.assertSameTree(source, to)

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


MEDDLER = """\
#!%s -IS
# A server's rsync that sends a file under another name than the one that it was asked for, when and as the file ORDER says.
import os, socket, subprocess, sys, threading
REAL, ORDER = %r
if "--daemon" not in sys.argv or not os.path.exists(ORDER):
    os.execv(REAL, [REAL] + sys.argv[1:])
OLD, NEW, SEEN = eval(open(ORDER).read())
ours, theirs = socket.socketpair()
process = subprocess.Popen([REAL] + sys.argv[1:], stdin=theirs, stdout=theirs)
theirs.close()
peer = socket.socket(fileno=os.dup(0))

def copy(source, target, old, new):
    for data in iter(lambda: source.recv(65536), b""):
        if old and old in data:
            open(SEEN, "w").close()
        target.sendall(data.replace(old, new) if old else data)
    target.shutdown(socket.SHUT_WR)
threading.Thread(target=copy, args=(peer, ours, b"", b""), daemon=True).start()
copy(ours, peer, OLD, NEW)
process.wait()
"""


class MeddlingServerTest(RsyncCase):
    """What a server's rsync sends under names that were not asked for comes to no place in a backup, nor anywhere else."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        for name in "other", "up", "root":
            c.source(name, "s")
        c.backup("b1", "a", "10M")
        tools, cls.order = c.path("tools"), c.path("order")
        os.mkdir(tools)
        write_file(tools + "/rsync", MEDDLER % (sys.executable, (shutil.which("rsync"), cls.order)))
        os.chmod(tools + "/rsync", 0o755)
        c.servers["s"] = c.spawn("s", "server", PATH=tools + os.pathsep + os.environ["PATH"])
        c._wait_ready("s")
        c.start("a")

    def sent_as(self, source, name):
        """A pass whose server sends the file of a directory as one of the directory `name`; then one with a server that does
        not."""
        c, asked, seen = self.c, b"a" * len(name), self.c.path("seen " + source)
        make_tree(c.sources[source].path, {os.fsdecode(asked) + "/file": b"asked for", "plain": b"1"})
        before = self.files()
        write_file(self.order, repr((asked, name, seen)))
        c.client("a")
        os.unlink(self.order)
        self.assertTrue(os.path.exists(seen))
        self.assertLessEqual(self.files() - before, {source + "/plain"})
        self.assertRc(0, c.client("a"))
        self.assertCopies(c, source, 1)
        self.assertEqual({source + "/plain", "%s/%s/file" % (source, os.fsdecode(asked))}, self.files() - before)
        self.assertLessEqual(before, self.files())

    def files(self):
        """The files in the backup's directory, without those that are no copies, and with those that are on their way."""
        backup = self.c.backups["b1"].path
        found = {os.path.relpath(os.path.join(folder, name), backup) for folder, _, names in os.walk(backup) for name in names}
        return {name for name in found if not name.startswith(".cbackup/") or "/incoming/" in name}

    def test_another_name(self):
        self.sent_as("other", b"eeeeeeee")

    def test_upwards(self):
        self.sent_as("up", b"../../..")

    def test_from_the_root(self):
        outside = self.directory()
        self.sent_as("root", os.fsencode(outside))
        self.assertEqual([], os.listdir(outside))


class OwnFailureTest(RsyncCase):
    """A client's rsync that fails is this machine's trouble: named, no host is called unreachable, nothing stays claimed."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        for number in range(4):     # one for each test
            c.source("docs%d" % number, "s")
        c.backup("b1", "a", "10M")
        c.start()
        cls.left = list(c.sources)

    def check(self, script, words, code=1):
        cluster, docs = self.c, self.left.pop()
        source = cluster.sources[docs].path
        make_tree(source, FILES)
        path = self.own_rsync(script)
        result = cluster.client("a", PATH=path)
        self.assertRc(code, result)
        self.assertOneError(result, *words)
        if code == 1:
            self.assertEqual([], result.json["unreachable"])
        self.assertNotIn("reached", result.stderr)
        figures = cluster.client("a")       # with a good one all is copied at once
        self.assertRc(0, figures)
        self.assertCopies(cluster, docs, 1)
        to = os.path.join(self.directory(), "to")
        result = cluster.restore("a", docs, to=to, PATH=path)
        self.assertRc(code, result)
        self.assertOneError(result, *words[1:])
        self.assertNotIn("no longer answers", result.stderr)
        self.assertRc(0, cluster.restore("a", docs, to=to))
        self.assertSameTree(source, to)

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


class RulesTest(unittest.TestCase):
    """What a server's rsync is told to serve, and nothing else."""

    def test_an_old_rsync_finds_a_path_also_where_it_looks_for_it_below_a_dot(self):
        self.assertEqual(b"+ /d\n+ /d/g\n- /**\n", cbackup.nothing_but([b"d/g"]))
        self.assertEqual(b"+ /.\n+ /d\n+ /./d\n+ /d/g\n+ /./d/g\n- /**\n", cbackup.nothing_but([b"d/g"], also_dotted=True))


class HowItEndedTest(unittest.TestCase):
    """Whose fault it was that an rsync ended, from what the relay saw, its exit status and its words."""

    TABLE = [
        ("the list was gone through", "done", [
            ("done", 0, ""), ("done", 23, "rsync: link_stat failed"), ("done", 24, ""),
            ("done", 11, "No space left on device"), ("cut", 0, ""), ("cut", 23, ""), ("unstarted", 0, ""), ("unstarted", 23, "")]),
        ("the peer was silent, whatever ours said of that", "stalled", [
            ("stalled", 0, ""), ("stalled", 30, "timeout"), ("stalled", -15, ""), ("stalled", 20, ""),
            ("stalled", 1, "")]),
        ("ours failed", "own", [
            ("done", 1, "unknown option"), ("done", 3, "errors selecting files"), ("done", 13, ""),
            ("done", 14, "fork"), ("done", 20, ""), ("done", 126, "sh: not executable"),
            ("done", 127, "sh: not found"), ("done", -9, ""),
            ("done", -6, "assertion failed at io.c(11)")]),
        ("ours did not even begin", "own", [
            ("unstarted", 12, "error in rsync protocol data stream"), ("unstarted", 5, ""),
            ("unstarted", 22, "out of luck"),
            ("unstarted", -9, ""), ("unstarted", 1, "")]),
        ("the peer went away, or said nonsense", "cut", [
            ("cut", 12, ""), ("cut", 10, ""), ("cut", 1, ""), ("cut", -9, ""), ("cut", 20, ""),
            ("done", 12, "connection unexpectedly closed"), ("done", 2, "protocol version mismatch"),
            ("done", 10, ""), ("done", 30, "timeout"), ("done", 22, "out of memory"),
            ("done", 5, "@ERROR: chroot failed")]),
        ("the peer made ours fail", "cut", [
            ("done", 1, "rsync error: syntax error (code 1) at clientserver.c(1) [sender=3.2.7]"),
            ("done", 13, "Invalid file index: 7 (code 13) at io.c(9)"),
            ("done", 3, "rsync error (code 3) at compat.c(5)")])]

    def test_each_end_is_put_down_to_the_right_side(self):
        for what, expected, ends in self.TABLE:
            for relayed, code, said in ends:
                with self.subTest(what, relayed=relayed, code=code, said=said):
                    result = cbackup.Pull(code=code, errors=[said] if said else [])
                    self.assertEqual(expected, cbackup._how_it_ended(relayed, result))


class TemporaryDirectoryTest(RsyncCase):
    """Where temporary files go is of no importance."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        c.source("odd", "s")
        c.source("noexec", "s")
        c.backup("b1", "a", "10M")
        c.start()

    def backed_up_with(self, folder, source):
        c = self.c
        make_tree(c.sources[source].path, FILES)
        self.assertRc(0, c.client("a", TMPDIR=folder))
        self.assertCopies(c, source, 1)
        self.assertRc(0, c.restore("a", source, to=os.path.join(self.directory(), "to"), TMPDIR=folder))
        self.assertEqual([], os.listdir(folder))

    def test_its_name_may_be_odd(self):
        folder = os.path.join(self.directory(), "it's \"a\" $HOME: dir\n#1")
        os.mkdir(folder)
        self.backed_up_with(folder, "odd")

    def test_nothing_may_be_executable_there(self):
        folder = os.path.join(self.directory(), "noexec")
        os.mkdir(folder)
        tmpfs_or_skip(self, folder, "4m,noexec")
        self.backed_up_with(folder, "noexec")


class MatrixTest(unittest.TestCase):
    """A short part of `python3 -m tests.matrix`: the oldest and the newest Python of this machine together."""

    def test_the_oldest_python_serves_the_newest(self):
        pythons = matrix.found_pythons()
        if len(pythons) < 2:
            self.skipTest("there are no two Pythons from 3.8 on here")
        self.assertEqual("", matrix.try_pair((pythons[0], None), (pythons[-1], None)))

    def test_a_pair_that_does_not_work_together_is_told(self):
        with Cluster() as place:
            write_file(place.path("rsync"), with_tools(OPENRSYNC.replace('"openrsync: protocol version 29"', '""'), "false"))
            os.chmod(place.path("rsync"), 0o755)
            self.assertIn("rsync", matrix.try_pair((None, None), (None, place.base)))


if __name__ == "__main__":
    unittest.main()
