"""A hostile rsync client: a member that drives the serving rsync with whatever options it likes gets what is in the source,
and nothing else; and it changes nothing.

Every rsync on PATH plays the client once; the serving side is the one that the program finds.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

import cbackup
from tests.harness import Case, read_file, tree, write_file


def rsyncs():
    """The different rsyncs on PATH."""
    found = [os.path.join(each, "rsync") for each in os.environ.get("PATH", "").split(os.pathsep)]
    return list(dict.fromkeys(os.path.realpath(path) for path in found if os.access(path, os.X_OK)))


class HostileRsyncTest(Case):
    """The source docs on s; outside of it lies a secret."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("docs", "s", {"f": b"1", "dir/g": b"2"})
        c.backup("ba", "a", "10M")
        cls.secret = c.path("s", "secret")
        write_file(cls.secret, b"the secret\nof the house\n")
        os.symlink(cls.secret, os.path.join(cls.source, "out"))
        os.symlink(os.path.dirname(cls.secret), os.path.join(cls.source, "outdir"))
        os.symlink("/", os.path.join(cls.source, "root"))
        c.start("s")
        c.settle()
        home = cbackup.Home(c.home("a"))
        cls.link = cbackup.Link("s", home.config(), cbackup.Dialer(home))
        cls.before = cls.state()

    @classmethod
    def state(cls):
        """All that is on s, but for the server's own books."""
        return {path: entry for path, entry in tree(cls.c.path("s")).items() if not path.startswith("home/state")}

    def rsync(self, program, options, sources=("m/.",), destination=None, upload=None):
        """Run a client; returns (what it brought, all that it said)."""
        connection = self.link.again().stream(of="source", name="docs", source="docs")
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

    def attack(self, *options, **more):
        for program in rsyncs():
            with self.subTest(program=program, options=options):
                brought, said = self.rsync(program, options, **more)
                self.assertNotIn(b"the secret", brought + said)
                self.assertNotIn(b"root:", brought + said)
                self.assertEqual(self.before, self.state(), said)
                self.assertTrue(self.c.servers["s"].running)

    def test_an_honest_client_gets_the_files(self):
        for program in rsyncs():
            brought, said = self.rsync(program, ["-r"])
            self.assertEqual({b"1", b"2"}, {bytes([byte]) for byte in brought}, said)

    def test_links_are_not_followed(self):
        for options in (["-rL"], ["-rk"], ["-r", "--copy-unsafe-links"], ["-r", "-M--copy-links"], ["-r", "-M-L"],
                        ["-r", "-M--copy-unsafe-links"], ["-r", "-M-k"]):
            self.attack(*options)

    def test_paths_do_not_lead_out(self):
        for path in ("m/../secret", "m/dir/../../secret", "m//etc/passwd", "m/out", "m/outdir/secret", "m/root/etc/passwd",
                     "/etc/passwd", "m/./../../", "nothing/."):
            self.attack("-r", sources=(path,))

    def test_lists_of_files_do_not_lead_out(self):
        names = os.path.join(self.directory(), "names")
        write_file(names, b"../secret\n/etc/passwd\nout/\noutdir/secret\nroot/etc/passwd\ndir/../../secret\n")
        self.attack("-r", "--files-from=" + names)
        self.attack("-r", "--files-from=" + names, "--no-relative")
        for there in (self.secret, "../secret", "out", "root/etc/passwd"):
            self.attack("-r", "--files-from=:" + there)
            self.attack("-r", "-M--exclude-from=" + there)
            self.attack("-r", "-M--filter=. " + there)

    def test_nothing_is_written_or_removed_at_the_source(self):
        here = os.path.join(self.directory(), "evil")
        write_file(here, b"evil")
        self.attack("-r", upload=here)
        self.attack("-r", "--delete", upload=os.path.dirname(here) + "/")
        self.attack("-r", "-M--remove-source-files")
        self.attack("-r", "--remove-source-files")
        self.attack("-r", "-M--log-file=" + self.c.path("s", "written"))
        self.attack("-r", "-M--log-file=/written", "-M--log-file-format=%f")
        self.attack("-r", "-M--write-batch=" + self.c.path("s", "batch"))
        self.attack("-r", "-M--only-write-batch=written")
        self.attack("-r", "-M--write-batch=written")
        self.attack("-r", "-M--rsync-path=/bin/sh")
        self.attack("-r", "-M--config=/dev/null", "-M--daemon")

    def test_a_symlink_in_the_place_of_a_backups_directory_is_not_served(self):
        base = self.c.backups["ba"].path
        self.c.start("a")
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


class OptionsTest(unittest.TestCase):
    def test_options_that_write_or_follow_are_refused_by_name(self):
        line = next(line for line in cbackup.RSYNC_DAEMON_CONFIG.splitlines() if line.startswith("refuse options"))
        for name in ("copy-links", "copy-unsafe-links", "copy-dirlinks", "remove-source-files", "write-batch", "log-file"):
            self.assertIn(name, line.split())

    def test_there_is_an_rsync_to_try(self):
        self.assertTrue(rsyncs() or not shutil.which("rsync"))


if __name__ == "__main__":
    unittest.main()
