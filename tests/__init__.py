"""The tests of cbackup: black-box tests that drive the real program through its contract.

Run all with `python3 -m unittest` from the project's top, or one file with `python3 -m unittest tests.test_restore`.
"""

import atexit
import hashlib
import importlib.util
import marshal
import os
import py_compile
import shutil
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(TOP, "cbackup.py")


def load_tests(loader, tests, pattern):
    """All tests, as a suite that keeps every processor busy; unittest's discovery asks for it."""
    from tests import parallel
    here = os.path.dirname(os.path.abspath(__file__))
    found = loader.discover(here, pattern or "test*.py", os.path.dirname(here))
    return parallel.ParallelSuite([found]) if parallel.JOBS > 1 else found


def load_program():
    """Imports the module `cbackup` from a compiled form that all processes of a run share; returns its path. To compile it takes as long as ten
    passes, and a process that did it has so much memory in use that each of its forks takes five times as long."""
    if not os.environ.get("CBACKUP_TEST_CODE"):
        os.environ["CBACKUP_TEST_CODE"] = tempfile.mkdtemp(prefix="cbackup-test-code-")
        atexit.register(forget_code, os.environ["CBACKUP_TEST_CODE"], os.getpid())
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


def forget_code(path, pid):
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


if "cbackup" not in sys.modules:
    COMPILED = load_program()       # a file that can be run, too
