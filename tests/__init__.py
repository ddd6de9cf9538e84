"""The tests of cbackup: black-box tests that drive the real program through its contract.

Run all with `python3 -m unittest` from the project's top, or one file with `python3 -m unittest tests.test_restore`.
"""

import contextlib
import hashlib
import importlib.util
import marshal
import os
import py_compile
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(TOP, "cbackup.py")

ENOUGH = 1 << 30
"""Bytes of room: several times as much as the tests have in use at any time."""

TIDY = """while read -r word; do kept=/code; done
{ rm -rf "$0$kept" || { sleep 2; chmod -R u+rwx "$0$kept"; rm -rf "$0$kept"; }; rmdir "$0"; } 2>/dev/null"""
"""For a shell whose input ends with the last process of a run, however that ends."""


def in_memory(folder="/dev/shm"):
    """The directory, when there is room in it and programs run from it, else None. Nothing waits
    there for a disk to make durable what is thrown away a moment later."""
    with contextlib.suppress(OSError):
        info = os.statvfs(folder)
        runs = not info.f_flag & getattr(os, "ST_NOEXEC", 0) and os.access(folder, os.W_OK)
        return folder if runs and info.f_bavail * info.f_frsize >= ENOUGH else None


IN_MEMORY = in_memory()
KEPT = None     # in a run's first process and its forks: where to say that a test failed and what it left has to stay


def begin():
    """In the first process of a run: the directory for what its processes share; and for all of
    their temporary files, when that can be in memory and $TMPDIR or the like does not say where."""
    global KEPT
    ours = IN_MEMORY and not any(map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    folder = tempfile.mkdtemp(prefix="cbackup-tests-", dir=IN_MEMORY if ours else None)
    os.chmod(folder, 0o711)     # some processes are another user's
    if ours:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.environ["CBACKUP_TEST_CODE"] = os.path.join(folder, "code")
    ends, KEPT = os.pipe()
    os.posix_spawn("/bin/sh", ["sh", "-c", TIDY, folder], os.environ, setpgroup=0,
                   file_actions=[(os.POSIX_SPAWN_DUP2, ends, 0)])
    os.close(ends)


def load_tests(loader, tests, pattern):
    """All tests, as a suite that keeps every processor busy; unittest's discovery asks for it."""
    from tests import parallel
    found = loader.discover(os.path.join(TOP, "tests"), pattern or "test*.py", TOP)
    return parallel.ParallelSuite([found]) if parallel.JOBS > 1 else found


def load_program():
    """Imports the module `cbackup` from a compiled form that all processes of a run share; returns its path. To compile it takes as long as ten
    passes, and a process that did it has so much memory in use that each of its forks takes five times as long."""
    if not os.environ.get("CBACKUP_TEST_CODE"):
        begin()
    with open(PROGRAM, "rb") as file:
        source = file.read()
    name = "%s-%s.pyc" % (sys.implementation.cache_tag, hashlib.sha256(PROGRAM.encode() + b"\0" + source).hexdigest())
    path = os.path.join(os.environ["CBACKUP_TEST_CODE"], name)
    if not os.path.exists(path):
        pid = os.fork()
        if pid == 0:
            try:
                py_compile.compile(PROGRAM, path)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    if os.path.exists(path):        # else it says itself what is wrong with it, when it is imported
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("cbackup", PROGRAM))
        sys.modules["cbackup"] = module
        with open(path, "rb") as file:
            exec(marshal.loads(file.read()[16:]), module.__dict__)      # after the header of such a file
    return path


if "cbackup" not in sys.modules:
    COMPILED = load_program()       # a file that can be run, too
