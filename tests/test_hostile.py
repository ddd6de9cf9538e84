"""A hostile rsync client: a member that drives the serving rsync with whatever options it likes gets what is in the catalog of
a source, and in a backup, and nothing else; and it changes nothing.

Every rsync on PATH plays the client once; the serving side is the one that the program finds.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

import cbackup
from tests.harness import PATIENCE, Case, Process, make_tree, one_in, quick_program, read_file, tree, write_file
from tests.members import between, one_pass


def rsyncs():
    """The different rsyncs on PATH."""
    found = [os.path.join(each, "rsync") for each in os.environ.get("PATH", "").split(os.pathsep)]
    return list(dict.fromkeys(os.path.realpath(path) for path in found if os.access(path, os.X_OK)))


def holds_links(rsync="rsync"):
    """Whether an rsync that is not locked into its directory follows no symlink out of it: 3.5 and newer."""
    said = subprocess.run([rsync, "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    found = re.search(r"version v?(\d+)\.(\d+)", said)
    return "openrsync" not in said and bool(found) and tuple(map(int, found.groups())) >= (3, 5)


class HostileRsyncTest(Case):
    """The source docs on s, and its backup ba on a; outside of both lies a secret, and in docs what its line leaves out."""

    USER = None
    PLACES = {"source": "docs", "backup": "ba"}
    PATHS = ["f", "dir/g", "out", "root/etc/passwd", "outdir/secret", "left/secret", "dir/x.tmp", "cache/secret", "new"]

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"f": b"1", "dir/g": b"2"}, exclude=["/left", "*.tmp"])
        cls.base = c.backup("ba", "a", "10M")
        cls.secret = c.path("s", "secret")
        write_file(cls.secret, b"the secret\nof the house\n")
        write_file(c.path("a", "backup", "secret"), b"the secret\nof the house\n")
        os.symlink(cls.secret, os.path.join(cls.source, "out"))
        os.symlink(os.path.dirname(cls.secret), os.path.join(cls.source, "outdir"))
        os.symlink("/", os.path.join(cls.source, "root"))
        make_tree(cls.source, {"left/secret": b"the secret", "dir/x.tmp": b"the secret", "cache/secret": b"the secret",
                               "cache/CACHEDIR.TAG": cbackup.CACHE_SIGNATURE})
        c.write_config()
        text = c.config().replace("exclude=/left", "exclude=/left exclude_caches")
        for host in ("s", "a"):
            write_file(os.path.join(c.home(host), "cbackup.conf"), text)
            cls.start(host)
        c.settle()
        cls.give("a")
        write_file(os.path.join(cls.source, "new"), b"the secret, which is in no catalog yet")
        home = cbackup.Home(c.home("a"))
        cls.links = {"source": cbackup.Link("s", home.config(), cbackup.Dialer(home)),
                     "backup": cbackup.Link("a", home.config(), cbackup.Dialer(home))}
        cls.before = cls.state()

    @classmethod
    def start(cls, host):
        if cls.USER is None:
            cls.c.start(host)
            return
        os.chmod(cls.c.base, 0o711)
        cls.give(host)
        cls.c.servers[host] = Process(quick_program("--home", cls.c.home(host), "server"), cls.c.environment(host),
                                      cls.c.path(host), user=cls.USER)
        cls.c._wait_ready(host)

    @classmethod
    def give(cls, host):
        """All that is on a host to the server's user; what the passes here make there is root's."""
        for above, folders, names in os.walk(cls.c.path(host)) if cls.USER else ():
            for path in [above] + [os.path.join(above, name) for name in folders + names]:
                os.chown(path, cls.USER, cls.USER, follow_symlinks=False)

    @classmethod
    def state(cls):
        """All that is on s and a, but for their own books."""
        return {path: entry for host in ("s", "a") for path, entry in tree(cls.c.path(host)).items()
                if not path.startswith("home/state") and "/.cbackup/" not in path and path not in ("home", "backup/ba")}

    def rsync(self, program, options, sources=("m/.",), destination=None, upload=None, of="source", paths=PATHS):
        """Run a client; returns (what it brought, all that it said).  paths: what it says it wants; None: it does not say."""
        fields = {"paths": paths} if paths is not None and of == "source" else {}
        connection = self.links[of].again().stream(of=of, name=self.PLACES[of], source="docs", **fields)
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryDirectory() as scratch:
            into = destination or os.path.join(scratch, "into")
            os.makedirs(into, exist_ok=True)
            shell = os.path.join(scratch, "connect")
            with open(shell, "w") as stream:
                stream.write("#!/bin/sh\nexec %s -I -S -c %s %d\n" % (
                    shlex.quote(sys.executable), shlex.quote(cbackup.CONNECT_CODE), theirs.fileno()))
            os.chmod(shell, 0o700)
            ends = [upload, "cbackup::m/"] if upload else ["cbackup::" + each for each in sources] + [into + "/"]
            process = subprocess.Popen([program] + list(options) + ["--timeout=20", "-e", "'%s'" % shell] + ends,
                                       pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
            theirs.close()
            said = []
            reader = threading.Thread(target=lambda: said.append(process.stdout.read()), daemon=True)
            reader.start()
            cbackup._relay_for(process, ours, connection, lambda count: None)
            connection.close()
            cbackup._reap(process, 10)
            reader.join(10)
            brought = b"".join(read_file(os.path.join(above, name)) for above, _, names in os.walk(into) for name in names
                               if not os.path.islink(os.path.join(above, name)))
            return brought, b"".join(said)

    def attack(self, *options, of="backup", **more):
        """Of a backup all is served: there it is rsync that must hold.  Of a source nothing but what was asked for."""
        if of == "backup" and (self.USER or os.geteuid()) and not holds_links():
            of = "source"
        for program in rsyncs():
            with self.subTest(program=program, options=options, of=of):
                brought, said = self.rsync(program, options, of=of, **more)
                self.assertNotIn(b"the secret", brought + said)
                self.assertNotIn(b"root:", brought + said)
                self.assertEqual(self.before, self.state(), said)
                self.assertTrue(self.c.servers["s"].running)

    def test_an_honest_client_gets_the_files(self):
        for program, of in itertools.product(rsyncs(), self.PLACES):
            brought, said = self.rsync(program, ["-r"], of=of)
            self.assertEqual({"1", "2"}, set(brought.decode().replace(cbackup.CACHE_SIGNATURE.decode(), "")), said)

    @unittest.skipUnless(os.geteuid() == 0 and os.path.isdir("/proc/self/root"), "only root sees where others are locked in")
    def test_as_root_rsync_is_locked_into_the_tree(self):
        for of, tree_of in (("source", self.source), ("backup", self.c.kept_as("ba", "docs"))):
            fields = {"paths": self.PATHS} if of == "source" else {}
            connection = self.links[of].again().stream(of=of, name=self.PLACES[of], source="docs", **fields)
            self.addCleanup(connection.close)
            connection.settimeout(20 * PATIENCE)
            connection.sendall(b"@RSYNCD: 31.0\nm\n")
            said = b""
            while b"@RSYNCD: OK\n" not in said:
                more = connection.recv(1000)
                self.assertTrue(more, said)
                said += more
            roots = set()
            for number in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):      # it has ended meanwhile
                    roots.add(os.readlink("/proc/%s/root" % number))
            (self.assertNotIn if self.USER else self.assertIn)(os.path.realpath(tree_of), roots)

    def test_what_is_left_out_or_in_no_catalog_is_not_served_whoever_names_it(self):
        for path in self.todays(("m/left/", "m/left/secret", "m/dir/x.tmp", "m/cache/secret", "m/new", "m/outdir/secret",
                                 "m/../secret"), 3):
            self.attack("-rL", sources=(path,), of="source")
        names = os.path.join(self.directory(), "names")
        write_file(names, b"left/secret\ndir/x.tmp\ncache/secret\nnew\nleft\n../secret\nout\nroot/etc/passwd\n")
        for paths in (self.PATHS, None, []):
            self.attack("-r", "--files-from=" + names, paths=paths, of="source")
            self.attack("-r", paths=paths, of="source")
        for paths in (["../secret"], ["/etc/passwd"], [""], "f", [1]):
            with self.assertRaises(cbackup.Refused):
                self.rsync("rsync", ["-r"], paths=paths)

    def test_links_are_not_followed(self):
        for options in self.todays((["-rL"], ["-rk"], ["-r", "--copy-unsafe-links"], ["-r", "-M--copy-links"], ["-r", "-M-L"],
                                    ["-r", "-M--copy-unsafe-links"], ["-r", "-M-k"]), 3):
            self.attack(*options)

    def test_paths_do_not_lead_out(self):
        for path in self.todays(("m/../secret", "m/dir/../../secret", "m//etc/passwd", "m/out", "m/outdir/secret",
                                 "m/root/etc/passwd", "/etc/passwd", "m/./../../", "nothing/."), 4):
            self.attack("-r", sources=(path,))

    def test_lists_of_files_do_not_lead_out(self):
        names = os.path.join(self.directory(), "names")
        write_file(names, b"../secret\n/etc/passwd\nout/\noutdir/secret\nroot/etc/passwd\ndir/../../secret\n")
        self.attack("-r", "--files-from=" + names)
        self.attack("-r", "--files-from=" + names, "--no-relative")
        for there in self.todays((self.secret, "../secret", "out", "root/etc/passwd"), 2):
            self.attack("-r", "--files-from=:" + there)
            self.attack("-r", "-M--exclude-from=" + there)
            self.attack("-r", "-M--filter=. " + there)

    def test_nothing_is_written_or_removed_at_the_source(self):
        here = os.path.join(self.directory(), "evil")
        write_file(here, b"evil")
        written = self.c.path("s", "written")
        for options, upload in self.todays([
                ([], here), (["--delete"], os.path.dirname(here) + "/"), (["-M--remove-source-files"], None),
                (["--remove-source-files"], None), (["-M--log-file=" + written], None),
                (["-M--log-file=/written", "-M--log-file-format=%f"], None),
                (["-M--write-batch=" + self.c.path("s", "batch")], None), (["-M--only-write-batch=written"], None), (["-M--write-batch=written"], None), (["-M--rsync-path=/bin/sh"], None),
                (["-M--config=/dev/null", "-M--daemon"], None)], 5):
            self.attack("-r", *options, upload=upload)

    def test_a_symlink_in_the_place_of_a_backups_directory_is_not_served(self):
        base = self.c.backups["ba"].path
        home = cbackup.Home(self.c.home("s"))
        link = cbackup.Link("a", home.config(), cbackup.Dialer(home))
        self.addCleanup(link.close)
        link.stream(of="backup", name="ba", source="docs").close()
        os.rename(os.path.join(base, "docs"), os.path.join(base, "elsewhere"))
        os.symlink("/etc", os.path.join(base, "docs"))
        try:
            with self.assertRaises(cbackup.Refused):
                link.stream(of="backup", name="ba", source="docs")
        finally:
            os.unlink(os.path.join(base, "docs"))
            os.rename(os.path.join(base, "elsewhere"), os.path.join(base, "docs"))
        for name in ("ba", "nothing"):
            with self.assertRaises(cbackup.Refused):
                link.stream(of="backup", name=name, source="../../etc")


@unittest.skipIf(os.geteuid(), "to be an ordinary user only root can choose")
@one_in(2)
class AsOrdinaryUserTest(HostileRsyncTest):
    """The same where the servers are an ordinary user's, and rsync is not locked in."""

    USER = 65534


class OddNamesTest(Case):
    """What a source may be read of is told to rsync in its own language."""

    NAMES = ("plain", "a[b]*?\\c", "a\nb\r", "back\\slash", " blank ", "#x;y", "***", "dir [x]/ y", "\udcff\udcfe", "+ z", "- z", "!")

    def test_files_are_copied_whatever_they_are_called_by_clients_of_this_level_and_of_the_first(self):
        for hello in (lambda hello: hello, lambda hello: dict(hello, level=1)):
            with self.cluster("s", "a", replicas=1) as c:
                c.source("docs", "s", {name: name.encode("utf-8", "surrogateescape") for name in self.NAMES}, exclude=["*.tmp"])
                c.backup("ba", "a", "10M")
                c.start("s")
                c.write_config()
                with between(c, "a", "s", hello=hello) as liar:
                    figures = one_pass(c, "a", liar.config)
                self.assertEqual((len(self.NAMES), []), (figures.counts["copied_files"], figures.lines))
                self.assertCopies(c, "docs", 1)


class OptionsTest(unittest.TestCase):
    def test_options_that_write_or_follow_are_refused_by_name(self):
        line = next(line for line in cbackup.RSYNC_DAEMON_CONFIG.splitlines() if line.startswith("refuse options"))
        for name in ("copy-links", "copy-unsafe-links", "copy-dirlinks", "remove-source-files", "write-batch", "log-file"):
            self.assertIn(name, line.split())

    def test_there_is_an_rsync_to_try(self):
        self.assertTrue(rsyncs() or not shutil.which("rsync"))


if __name__ == "__main__":
    unittest.main()
