"""Which rsyncs and which Pythons work together: `python3 -m tests.matrix [--rsync PATH ...] [--python PATH ...]`.

For each pair a small cluster is made, its server with the one, its client with the other: a tree with odd names is backed up,
changed, backed up again, restored and compared; what the source's line leaves out is asked for, and does not come (with
openrsync serving that is not looked at). Without arguments those are tried that are found here: the rsync in PATH and
python3.8 and newer. The rows of the tables are the servers, the columns the clients; the exit status is 1 when a pair failed.
"""

import argparse
import contextlib
import glob
import os
import re
import shutil
import subprocess
import sys

import cbackup
from tests.harness import DIRECTORY, Cluster, Link, Process, differences, make_tree, quick_program, some_bytes

FILES = {"plain": b"1", "large": some_bytes(700000, 1), "empty": b"", "void": DIRECTORY, "d/e f/g": b"2", "new\nline": b"3",
         "#hash": b"4", ";semicolon": b"5", "-dash": b"6", "[b]*?": b"7", "back\\slash": b"8", " blanks ": b"9", "gr\u00fcn": b"10",
         "link": Link("d/e f/g"), "d/x:y": b"11"}
CHANGED = {"plain": b"changed", "large": some_bytes(700000, 1) + b"and more", "new one": b"12", "d/;another": b"13"}


def version_of_rsync(path):
    text = subprocess.run([path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode(errors="replace")
    if "openrsync" in text:
        return "openrsync"
    return re.search(r"version\s+v?([\d.]+)", text).group(1)


def version_of_python(path):
    return subprocess.run([path, "-c", "import sys; print('%d.%d.%d%s' % (sys.version_info[:3] + (getattr(sys, 'abiflags', ''),)))"],
                          stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def found_pythons():
    """Paths, one of each minor version, the oldest first."""
    folders = glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin")) + os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = {}
    for folder in folders:
        for path in glob.glob(os.path.join(folder, "python3.[0-9]*")):
            match = re.search(r"python3\.(\d+)t?\Z", path)
            if match and int(match.group(1)) >= 8 and int(match.group(1)) not in found and subprocess.call(
                    [path, "-c", "import sqlite3, ssl"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
                found.setdefault(int(match.group(1)), path)
    return [found[minor] for minor in sorted(found)]


class MixedCluster(Cluster):
    """Each host with a Python and an rsync of its own: {host: (python or None, directory with `rsync` or None)}."""

    def __init__(self, with_what):
        super().__init__(*with_what, replicas=1)
        self.with_what = with_what

    def spawn(self, host, *arguments, **more):
        python, tools = self.with_what[host]
        if tools:
            more["PATH"] = tools + os.pathsep + os.environ.get("PATH", os.defpath)
        if python is None:
            return super().spawn(host, *arguments, **more)
        self.write_config()
        command = [python] + quick_program("--home", self.home(host), *arguments)[1:]
        return Process(command, self.environment(host, **more), self.path(host))


def try_pair(server, client):
    """"" when a cluster does everything; else what went wrong, in one line. server, client: (python, directory with rsync)."""
    with MixedCluster({"s": server, "a": client}) as cluster:
        try:
            source = cluster.source("docs", "s", FILES, exclude=["/left"])
            cluster.backup("b1", "a", "10M")
            cluster.start()
            cluster.settle()
            make_tree(source, CHANGED)
            os.unlink(os.path.join(source, "d/x:y"))
            cluster.settle()
            served = served_to_a_member(cluster, source)
            if served != ["plain"] and not (server[1] and is_openrsync(server[1])):
                return "served: %r" % served
            missing = [name for name, there in cluster.copies_on_disk("docs").items() if there != ["b1"]]
            if missing:
                return "no copy of %r" % missing[:3]
            for host in "as":       # the one fetches from itself, the other from the other
                to = cluster.path("restored by " + host)
                result = cluster.restore(host, "docs", to=to)
                if result.rc:
                    return "restore: " + result.stderr.strip()[:300]
                wrong = differences(source, to)
                if wrong:
                    return "restored: " + "; ".join(wrong)[:300]
        except AssertionError as error:
            text = " ".join(str(error).split())
            return text if len(text) <= 400 else text[:100] + " ... " + text[-300:]    # its last words say why
    return ""


def served_to_a_member(cluster, source):
    """What comes of a file of the source and of one that its line leaves out, when a member asks for both."""
    make_tree(source, {"left/secret": b"the secret"})
    home, to = cbackup.Home(cluster.home("a")), cluster.path("asked for")
    os.mkdir(to)
    with contextlib.closing(cbackup.Link("s", home.config(), cbackup.Dialer(home))) as link:
        connection = link.stream(of="source", name="docs", source="docs", paths=["plain", "left/secret"])
        cbackup.pull(connection, [b"plain", b"left/secret"], os.fsencode(to))
    found = sorted(name for name in ("plain", "left/secret") if os.path.exists(os.path.join(to, name)))
    shutil.rmtree(os.path.join(source, "left"))
    return found


def is_openrsync(folder):
    return version_of_rsync(os.path.join(folder, "rsync")) == "openrsync"


def directory_for(rsync, scratch, number):
    """A directory in which the program `rsync` is this one."""
    folder = os.path.join(scratch, "rsync-%d" % number)
    os.mkdir(folder)
    os.symlink(os.path.abspath(rsync), os.path.join(folder, "rsync"))
    return folder


def table(title, names, what, out=sys.stdout):
    """Tries all pairs of `what`, (python, directory) each, and prints the table. Returns the failures."""
    failures, width = [], max(map(len, names)) + 2
    print("%s: rows are servers, columns are clients\n%s" % (title, " " * width + "".join(name.ljust(width) for name in names)),
          file=out, flush=True)
    for row, server in enumerate(what):
        cells = []
        for column, client in enumerate(what):
            why = try_pair(server, client)
            cells.append("FAILED" if why else "ok")
            if why:
                failures.append("server %s, client %s: %s" % (names[row], names[column], why))
        print(names[row].ljust(width) + "".join(cell.ljust(width) for cell in cells), file=out, flush=True)
    for line in failures:
        print(line, file=out)
    return failures


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--rsync", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--python", nargs="+", default=[], metavar="PATH")
    args = parser.parse_args()
    failures = []
    with Cluster() as place:
        if args.rsync or not args.python:
            rsyncs = args.rsync or [os.path.join(folder, "rsync") for folder in os.environ["PATH"].split(os.pathsep)
                                    if os.access(os.path.join(folder, "rsync"), os.X_OK)][:1]
            folders = [directory_for(path, place.base, number) for number, path in enumerate(rsyncs)]
            failures += table("rsync", [version_of_rsync(path) for path in rsyncs], [(None, folder) for folder in folders])
        if args.python or not args.rsync:
            pythons = args.python or found_pythons()
            failures += table("Python", [version_of_python(path) for path in pythons], [(path, None) for path in pythons])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
