"""Backup directories made by hand, as if they had been carried here from another machine, and restores from them.

What is written here is the format of a catalog as the program writes it: one file `SINCE-UPTO-TIME.gz` of JSON lines below
`.cbackup/catalog/SOURCE/`, ended by an object that counts them. A test may write lines that the program never would.
"""

import gzip
import hashlib
import json
import os

from tests.harness import Case, Process, make_tree, plain_environment, quick_program, write_file

WHEN = 1750000000       # the time of the catalogs and of the files in them
OWN = object()


def row(path, kind="f", content=b"", size=None, mtime=WHEN * 10 ** 9, mode=None, uid=OWN, gid=OWN, user="", group="", link=None,
        extra=OWN, holders=("other",)):
    """A line of a catalog: by default what a file of this content, a directory, or a symlink to `content` would have."""
    content = content.encode() if isinstance(content, str) else content
    if extra is OWN:
        extra = hashlib.blake2b(content, digest_size=32).hexdigest() if kind == "f" else \
            content.decode("utf-8", "surrogateescape") if kind == "l" else None
    return [path, kind, (len(content) if kind == "f" else 0) if size is None else size, mtime,
            {"f": 0o644, "d": 0o755, "l": 0o777}.get(kind, 0) if mode is None else mode,
            os.geteuid() if uid is OWN else uid, os.getegid() if gid is OWN else gid, user, group, link, extra, list(holders)]


def catalog_bytes(rows, end=OWN):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    lines.append(json.dumps({"catalog": 1, "source": "docs", "books": "b", "since": 0, "upto": 1, "time": WHEN,
                             "end": len(rows) if end is OWN else end}).encode())
    return b"\n".join(lines) + b"\n"


def make_disk(path, rows, files=(), source="docs", catalog="000000000000-000000000001-%d.gz" % WHEN, packed=None):
    """A backup's directory at `path`: a catalog of these rows, and the copies `files` (as in make_tree), with the mtime
    WHEN. packed: the catalog file itself instead."""
    place = os.path.join(path, ".cbackup", "catalog", source, catalog)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    write_file(os.path.join(path, ".cbackup", "identity"), json.dumps({"id": "0123456789abcdef", "cluster": "c",
                                                                       "backup": "disk"}))
    write_file(place, gzip.compress(catalog_bytes(rows), 1) if packed is None else packed)
    make_tree(os.path.join(path, source), dict(files))
    for folder, _, names in os.walk(os.path.join(path, source)):
        for one in names:
            os.utime(os.path.join(folder, one), ns=(WHEN * 10 ** 9,) * 2, follow_symlinks=False)
    return path


class DiskCase(Case):
    """A machine without configuration, key or network, and disks that are simply there."""

    def setUp(self):
        self.base = self.directory()
        self.to = os.path.join(self.base, "outer", "target")
        os.makedirs(os.path.dirname(self.to))

    def disk(self, rows, files=(), name="disk", **more):
        return make_disk(os.path.join(self.base, name), rows, files, **more)

    def words(self, disks, options=(), paths=()):
        """The command line `restore docs [PATH ...] --from DISK ... --to TARGET ...` on a machine without a home."""
        words = ["--home", os.path.join(self.base, "no home"), "restore", "docs"] + list(paths)
        for disk in disks:
            words += ["--from", disk]
        return words + ["--to", self.to] + list(options)

    def spawn(self, *disks, **more):
        """Starts such a restore; returns a Process."""
        return Process(quick_program(*self.words(disks, **more)), plain_environment(self.base), self.base)

    def attempt(self, *disks, timeout=20, memory=None, user=None, **more):
        """Runs such a restore to its end, whatever it is; but what went wrong must be said in words, and no byte that
        a terminal would obey. memory: bytes of address space that it may have. user: who runs it.
        Returns the Result.
        """
        result = Process(quick_program(*self.words(disks, **more)), plain_environment(self.base), self.base, user=user,
                         memory=memory).wait(timeout)
        self.assertIn(result.rc, (0, 1, 2), str(result))
        for bad in ("mistake in cbackup", "Traceback", "\033"):
            self.assertNotIn(bad, result.text, str(result))
        for line in result.error_lines:
            self.assertTrue(line.startswith("cbackup: "), str(result))
        return result

    def restored(self, *disks, rc=0, **more):
        """The same, and it must end with `rc`."""
        result = self.attempt(*disks, **more)
        self.assertRc(rc, result)
        return result

    def back(self):
        """{relative path} of what is in the target, without what an incomplete restore keeps for the next run."""
        found = set()
        for folder, folders, names in os.walk(self.to):
            folders[:] = [name for name in folders if name != ".cbackup-restore"]
            found |= {os.path.relpath(os.path.join(folder, name), self.to) for name in folders + names}
        return found
